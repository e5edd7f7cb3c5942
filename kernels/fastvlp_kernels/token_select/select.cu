// token_select in one launch, a block per segment: a radix select in shared memory finds the lowest score that stays, digit by digit from
// the highest, and a walk over the segment writes the places of what stays. Scores are compared as integers, so half precision needs no
// header (NVRTC has none), and the only atomics count, which gives the same in any order. Blocks are whole warps, 1024 threads at most.

constexpr int WARP = 32, MOST_WARPS = 32, DIGIT = 8, BINS = 1 << DIGIT;
constexpr unsigned ALL = 0xffffffffu;

// What one digit leaves: the digits of the lowest score that stays so far, how many tokens with these digits stay, how many have them.
struct Found {
    unsigned threshold;
    int need, equal;
};

// Orders as the scores do, where NaN is as low as -inf, and -0 is 0.
template <typename Bits, unsigned INFINITE>
__device__ unsigned key_of(Bits bits) {
    constexpr unsigned sign = 1u << (8 * sizeof(Bits) - 1);
    const unsigned magnitude = bits & (sign - 1);
    if (magnitude > INFINITE) return sign - INFINITE;
    return bits & sign ? sign - magnitude : sign + magnitude;
}

// For one warp: the bin of the need-th token from the highest bin down. Clears the bins for the next digit.
__device__ void pick(int* histogram, unsigned threshold, int need, Found* found) {
    constexpr int mine = BINS / WARP;
    const int lane = threadIdx.x, highest = BINS - 1 - lane * mine;
    int sum = 0;
    for (int j = 0; j < mine; ++j) sum += histogram[highest - j];
    int above = sum;
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(ALL, above, step);
        if (lane >= step) above += other;
    }
    above -= sum;
    for (int j = 0; j < mine; ++j) {
        const int bin = highest - j, equal = histogram[bin];
        if (above < need && need <= above + equal) *found = {threshold << DIGIT | bin, need - above, equal};
        above += equal;
        histogram[bin] = 0;
    }
}

// index [total]: the tokens that stay, ascending. starts [S+1]: where the segments begin in it.
// cu: int64 [S+1] where wide, else int32. each [S]: float64 where share, else int64; where it is null, number holds for all segments.
template <typename Bits, unsigned INFINITE>
__device__ void select(const Bits* scores, const void* cu, long long wide, const void* each, double number, long long share,
                       long long protect, long long total, long long* index, int* starts) {
    __shared__ int histogram[BINS], before;
    __shared__ Found found;
    __shared__ unsigned totals[2][MOST_WARPS];
    const int segment = blockIdx.x, thread = threadIdx.x, threads = blockDim.x, warp = thread / WARP, lane = thread % WARP;

    auto start_of = [=](int s) -> long long { return wide ? ((const long long*)cu)[s] : ((const int*)cu)[s]; };
    auto kept = [=](int s) -> int {  // the host's float64 arithmetic
        const long long length = start_of(s + 1) - start_of(s);
        long long count;
        if (share) {
            count = (long long)((double)length * (each ? ((const double*)each)[s] : number));
        } else {
            count = each ? ((const long long*)each)[s] : (long long)number;
        }
        count = count < protect ? protect : count;
        return (int)(count < length ? count : length);
    };

    for (int bin = thread; bin < BINS; bin += threads) histogram[bin] = 0;
    if (thread == 0) before = 0;
    __syncthreads();
    int sum = 0;
    for (int s = thread; s < segment; s += threads) sum += kept(s);
    if (sum) atomicAdd(&before, sum);

    const long long start = start_of(segment);
    const int n = (int)(start_of(segment + 1) - start), count = kept(segment);
    // Tokens below first stay whatever their scores, tokens from last on go.
    const int first = count == n ? n : (int)protect, last = count == first ? first : n;
    const Bits* row = scores + start;

    Found now = {0, count - first, last - first};
    int shift = 8 * sizeof(Bits);
    while (now.need < now.equal && shift > 0) {
        shift -= DIGIT;
        for (int i = first + thread; i < n; i += threads) {
            const unsigned key = key_of<Bits, INFINITE>(row[i]);
            if (key >> shift >> DIGIT == now.threshold) atomicAdd(&histogram[key >> shift & (BINS - 1)], 1);
        }
        __syncthreads();
        if (warp == 0) pick(histogram, now.threshold, now.need, &found);
        __syncthreads();
        now = found;
    }
    __syncthreads();
    if (thread == 0) {
        starts[segment + 1] = before + count;
        if (segment == 0) starts[0] = 0;
    }

    // Packed in halves of 32 bits: how many tokens surely stay, and how many equal the threshold, of which the first stay.
    int sure = 0, equal = 0;
    for (int from = 0, turn = 0; from < last; from += threads, turn ^= 1) {
        const int i = from + thread;
        bool stays = i < first, ties = false;
        if (first <= i && i < last) {
            const unsigned key = key_of<Bits, INFINITE>(row[i]) >> shift;
            stays = key > now.threshold;
            ties = key == now.threshold;
        }
        const unsigned stay = __ballot_sync(ALL, stays), tie = __ballot_sync(ALL, ties), lower = (1u << lane) - 1;
        if (lane == 0) totals[turn][warp] = __popc(stay) | __popc(tie) << 16;
        __syncthreads();  // the other half of totals may still be read
        unsigned earlier = __popc(stay & lower) | __popc(tie & lower) << 16, all = 0;
        for (int w = 0; w < threads / WARP; ++w) {
            if (w == warp) earlier += all;
            all += totals[turn][w];
        }
        const int stayed = sure + (int)(earlier & 0xffff), tied = equal + (int)(earlier >> 16);
        const long long place = (long long)before + stayed + (tied < now.need ? tied : now.need);
        // Beyond total only if lengths did not say what cu_seqlens does.
        if ((stays || (ties && tied < now.need)) && (unsigned long long)place < (unsigned long long)total) index[place] = start + i;
        sure += all & 0xffff;
        equal += all >> 16;
    }
}

#define SELECT(NAME, BITS, INFINITE)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARP * MOST_WARPS)                                                                   \
        NAME(const BITS* scores, const void* cu, long long wide, const void* each, double number, long long share, long long protect, \
             long long total, long long* index, int* starts) {                                                                        \
        select<BITS, INFINITE>(scores, cu, wide, each, number, share, protect, total, index, starts);                                 \
    }

SELECT(select_float32, unsigned, 0x7f800000u)
SELECT(select_float16, unsigned short, 0x7c00u)
SELECT(select_bfloat16, unsigned short, 0x7f80u)
