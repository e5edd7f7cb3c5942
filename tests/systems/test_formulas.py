"""What systems of their own formula compute, sample by sample in plain mathematics from their weights."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fastvlp.layers import FusedBlocks
from fastvlp.losses import kmeans
from fastvlp.systems.filip import Filip
from fastvlp.systems.llama_fusion import LlamaFusion
from fastvlp.systems.pyramid_drop import PyramidDrop
from fastvlp.systems.solo import Solo
from fastvlp_kernels.packed import Packed
from tests.systems.small import PATCH, WORDS, joint, make, text, vit, whole
from tests.towers import plain


def batch():
    return whole().take([4, 1, 6, 0])


def alone(packed):
    """The segments as packed batches of one."""
    return [packed.take([row]) for row in range(len(packed))]


def through(blocks, x, seen):
    for block in blocks:
        x, _ = plain.block(block, x, seen)
    return x


def loss_of(system, given):
    given = dataclasses.replace(given, counts=system.counts(given))
    return sum(system.means(system.encode(given), given).values())


def test_unified_vlp():
    system, given = make("unified_vlp"), batch()
    terms = []
    for image, words, masked, draw in zip(alone(given.image), given.text.segments(), alone(given.masked), given.draw, strict=True):
        one_way = bool(draw < system.seq2seq)
        ids = masked.x.clone()
        if one_way:
            ids[-1] = WORDS
        x, y = system.image.embed(image).x, system.text.embed(masked.replace(x=ids)).x
        x = torch.cat([x + system.kinds[int(one_way), 0], y + system.kinds[int(one_way), 1]])
        seen = plain.earlier_seen(len(x), image.total) if one_way else plain.all_seen(len(x))
        logits = system.words(plain.norm(system.joint.norm_out, through(system.joint.blocks, x, seen)))[image.total:]
        terms += [F.cross_entropy(logits[n], words[n]) for n in range(len(words)) if ids[n] != words[n]]
    assert {bool(draw < system.seq2seq) for draw in given.draw} == {True, False}
    torch.testing.assert_close(loss_of(system, given), torch.stack(terms).mean())


def test_mae():
    """Picture by picture: mask tokens stand at the places that were left out, and their pixels alone count."""
    system, given = make("mae"), batch()
    terms = []
    for image, kept in zip(alone(given.image), alone(given.kept), strict=True):
        seen, x = system.narrow(system.image(kept).x), []
        places = [tuple(place) for place in kept.pos[:, 1:].tolist()]
        for row, column in image.pos[:, 1:].tolist():
            token = seen[places.index((row, column))] if (row, column) in places else system.mask
            x.append(token + system.rows[row] + system.columns[column])
        decoded = plain.norm(system.decoder.norm_out, through(system.decoder.blocks, torch.stack(x), plain.all_seen(len(x))))
        for patch, place, told in zip(image.x / 255, image.pos[:, 1:].tolist(), system.pixels(decoded), strict=True):
            if tuple(place) not in places:
                target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                terms.append((told - target).square().mean())
    torch.testing.assert_close(loss_of(system, given), torch.stack(terms).mean())


def test_filip_sends_the_tokens_that_are_nearest_to_their_pair():
    torch.manual_seed(0)
    system, given = Filip(vit(), text(), 16, keep=0.4).double(), batch()
    with torch.no_grad():
        image, words, out = system.image_tokens(given.image), system.text_tokens(given.text), system.encode(given)
    for mine, other, found in ((image, words, out["image"]), (words, image, out["text"])):
        for x, y, kept in zip(mine.segments(), other.segments(), found.segments(), strict=True):
            count = -(-4 * len(x) // 10)
            best = sorted(range(len(x)), key=lambda i, x=x, y=y: -max(float(x[i] @ token) for token in y))[:count]
            torch.testing.assert_close(kept, x[sorted(best)])


def test_aim():
    system, given = make("aim"), batch()
    terms = []
    for image, draw in zip(alone(given.image), given.draw.tolist(), strict=True):
        n = image.total
        first = 1 + int(draw * (n - 1))
        assert 1 <= first <= n - 1
        x = through(system.image.blocks, system.image.embed(image).x, plain.earlier_seen(n, first))
        told = system.head(plain.norm(system.image.norm_out, x))
        for i in range(first, n):
            pixels = image.x[i] / 255
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            terms.append((told[i - 1] - target).square().mean())
    torch.testing.assert_close(loss_of(system, given), torch.stack(terms).mean())


def test_solo_marks_rows():
    torch.manual_seed(0)
    system = Solo(vit(), text(), joint()).double()
    places = [[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)], [(0, 0)], [(0, 2), (2, 1)]]
    pos = torch.tensor([(0, *place) for image in places for place in image], dtype=torch.int32)
    images = Packed.of(torch.rand(9, 3 * PATCH**2, dtype=torch.float64) * 255, [6, 1, 2], pos=pos)
    words = whole().text.take([0, 1, 2])
    begin, row, end = system.marks
    expected = []
    for image, patches, caption in zip(places, system.image.embed(images).segments(), alone(words), strict=True):
        x = [begin]
        for n, patch in enumerate(patches):
            x += [row, patch] if n and image[n][0] != image[n - 1][0] else [patch]
        x = torch.cat([torch.stack([*x, end]), system.text.embed(caption).x])
        expected.append(plain.norm(system.joint.norm_out, through(system.joint.blocks, x, plain.earlier_seen(len(x))))[-caption.total:])
    torch.testing.assert_close(system.states(images, words).x, torch.cat(expected))


@pytest.mark.parametrize("drop_before", [(), (0,), (1, 2)])
def test_pyramid_drop(drop_before):
    torch.manual_seed(0)
    tower = joint()
    tower.blocks.append(joint().blocks[0])
    system, given = PyramidDrop(vit(), text(), tower, drop_before, keep=0.6).double(), batch()
    expected, dropped = [], 0
    for image, words in zip(alone(given.image), alone(given.text), strict=True):
        kept, remain = list(range(image.total)), image.total
        x = torch.cat([system.connector(system.image(image).x), system.text.embed(words).x])
        for number, block in enumerate(tower.blocks):
            if number in drop_before:
                remain = int(image.total * 0.6 ** (drop_before.index(number) + 1))
                q, k, _ = (part.unflatten(-1, (2, -1)) for part in plain.linear(block.qkv, plain.norm(block.norm1, x)).chunk(3, -1))
                scores = torch.einsum("hd,nhd->hn", q[len(kept)], k[:len(kept) + 1]) * q.shape[-1] ** -0.5
                share = scores.softmax(1).mean(0)[:len(kept)]
                stay = sorted(share.topk(remain).indices.tolist())
                dropped += len(kept) - remain
                kept = [kept[i] for i in stay]
                x = torch.cat([x[stay], x[-words.total:]])
            x, _ = plain.block(block, x, plain.earlier_seen(len(x)))
        expected.append(plain.norm(tower.norm_out, x)[-words.total:])
    assert bool(dropped) == bool(drop_before)
    torch.testing.assert_close(system.states(given.image, given.text).x, torch.cat(expected))


def test_ep_alm():
    system, given = make("ep_alm"), batch()
    expected = []
    for image, words in zip(alone(given.image), alone(given.text), strict=True):
        seen, y = [], system.image.embed(image).x
        for block in system.image.blocks:
            y, _ = plain.block(block, y, plain.all_seen(len(y)))
            seen.append(plain.linear(system.to_lm, y.mean(0)))
        x = torch.cat([system.prompt, system.lm.text.embed(words).x])
        for number, block in enumerate(system.lm.joint.blocks):
            if number:  # blocks 1 and 2 get the towers' two layers
                x = torch.cat([seen[number - 1][None], x[-len(system.prompt) - words.total:]])
            x, _ = plain.block(block, x, plain.earlier_seen(len(x)))
        expected.append(plain.norm(system.lm.joint.norm_out, x)[-words.total:])
    torch.testing.assert_close(system.states(given.image, given.text).x, torch.cat(expected))


def test_adem_vl():
    system, given = make("adem_vl"), batch()
    torch.nn.init.normal_(system.values)
    expected = []
    for image, words in zip(alone(given.image), alone(given.text), strict=True):
        rows, columns = (image.pos[:, 1:].amax(0) + 1).tolist()
        tokens = system.image(image).x.T.reshape(1, -1, rows, columns)
        pooled = torch.cat([F.adaptive_avg_pool2d(tokens, side).flatten(2)[0].T for side in (2, 1)])
        y = 0.5 * system.to_lm(pooled)
        keys, values = y + system.keys, y + system.values
        x = system.lm.text.embed(words).x
        for block in system.lm.joint.blocks:
            after = []
            out, _ = plain.block(block, x, plain.earlier_seen(len(x)), look=lambda h, after=after: after.append(h) or h)
            scores = F.silu(plain.norm(block.norm2, after[0])) @ F.silu(keys).T
            least = scores.sort(1).values[:, int(0.3 * len(keys))]
            x = out + 0.5 * (scores * (scores >= least[:, None])) @ values
        expected.append(plain.norm(system.lm.joint.norm_out, x))
    torch.testing.assert_close(system.states(given.image, given.text).x, torch.cat(expected))


def test_fused_blocks():
    torch.manual_seed(0)
    fusion, image, words = FusedBlocks(32, 24, 2, 2).double(), vit().double(), text(width=24).double()
    for number, read in enumerate([*fusion.image_reads, *fusion.text_reads]):
        torch.nn.init.constant_(read.gate, number - 1.3)
    x, y = Packed.of(torch.randn(9, 32).double(), [4, 5]), Packed.of(torch.randn(6, 24).double(), [2, 4])
    found = fusion(x, y, image.blocks, words.blocks)
    expected = [], []
    for a, b in zip(x.segments(), y.segments(), strict=True):
        for n in range(2):
            new = []
            for block, read, own, other in ((image.blocks[n], fusion.image_reads[n], a, b), (words.blocks[n], fusion.text_reads[n], b, a)):
                def look(h, read=read, own=own, other=other):
                    added = plain.cross(read.cross, h - own, other) - (h - own)
                    return h + read.gate * added

                new.append(plain.block(block, own, plain.all_seen(len(own)), look=look)[0])
            a, b = new
        expected[0].append(a)
        expected[1].append(b)
    sides = [torch.cat([part.flatten() for part in parts]) for parts in ((found[0].x, found[1].x), (*expected[0], *expected[1]))]
    plain.same(*sides, [*fusion.named_parameters(), *image.blocks.named_parameters(), *words.blocks.named_parameters()])


def test_closed_gates_leave_the_towers_alone():
    torch.manual_seed(0)
    fusion, image, words = FusedBlocks(32, 32, 2, 2), vit(), text()
    patches, tokens = image.embed(whole().image.replace(x=whole().image.x.float())), words.embed(whole().text)
    found = fusion(patches, tokens, image.blocks, words.blocks)
    for side, tower, given in zip(found, (image, words), (whole().image, whole().text), strict=True):
        torch.testing.assert_close(tower.norm_out(side.x), tower(given.replace(x=given.x.float() if tower is image else given.x)).x)


def test_flame():
    """K passes, one for each prompt, and K softmaxes over the batch in each direction."""
    system, given = make("flame"), batch()
    features = []
    for words in given.text.segments():
        for prompt in system.prompts:
            ids = torch.tensor([*words[:-1].tolist(), *prompt])
            x = through(system.lm.joint.blocks[:-1], plain.words(system.lm.text, ids), plain.earlier_seen(len(ids)))
            features.append(F.normalize(x[-1], dim=0))
    features = torch.stack(features).view(len(given), len(system.prompts), -1)
    out = system.encode(given)
    torch.testing.assert_close(out["text"], features)
    logits = system.scale()[0] * torch.einsum("id,jkd->kij", out["image"], features)
    truth = torch.arange(len(given))
    each = [F.cross_entropy(side, truth) for facet in logits for side in (facet, facet.T)]
    torch.testing.assert_close(system.objective(out, given)["contrastive"], torch.stack(each).mean())
    mean = F.normalize(system.facets(given.text).mean(1), dim=1)
    torch.testing.assert_close(system.embed_text(given.text), mean)


def test_llama_fusion():
    system, given = make("llama_fusion"), batch()
    for number, tensor in enumerate(parameter for parameter in system.parameters() if parameter.requires_grad):
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    expected = []
    for image, words in zip(alone(given.image), alone(given.text), strict=True):
        x, n = torch.cat([system.image.embed(image).x, system.text.embed(words).x]), image.total
        for block in system.blocks:
            kinds = [(block.kind_1, slice(n)), (block.kind_0, slice(n, None))]
            q, k, v = torch.cat([plain.linear(one.qkv, plain.norm(one.norm1, x[part])) for one, part in kinds]).chunk(3, -1)
            read = plain.attention(2, q, k, v, plain.earlier_seen(len(x), n), torch.ones(len(x)).double())
            x = x + torch.cat([plain.linear(one.proj, read[part]) for one, part in kinds])
            x = x + torch.cat([plain.linear(one.down, F.gelu(plain.linear(one.up, plain.norm(one.norm2, x[part])))) for one, part in kinds])
        expected.append(plain.norm(system.norm_out, x[n:]))
    torch.testing.assert_close(system.states(given.image, given.text).x, torch.cat(expected))


def test_llama_fusion_leaves_text_alone_as_it_was():
    lm, given = make("simvlm"), batch()
    system = LlamaFusion(vit(), lm).double()
    for tensor in system.parameters():
        if tensor.requires_grad:
            tensor.data += 1
    nothing = given.image.first(0)
    assert torch.equal(system.states(nothing, given.text).x, lm.states(nothing, given.text).x)


def test_bert_hides_each_token_in_turn():
    system, given = make("bert"), batch()
    expected = []
    for one in alone(given.text):
        total = 0.0
        for n in range(1, one.total):
            ids = one.x.clone()
            ids[n] = WORDS
            total += F.cross_entropy(system.words(system.text(one.replace(x=ids)).x)[n], one.x[n])
        expected.append(total)
    torch.testing.assert_close(system.caption_nll(None, given.text), torch.stack(expected))


def test_distilbert():
    system, given = make("distilbert"), batch()
    with torch.no_grad():
        for parameter in system.text.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    far, right, apart = [], [], []
    for words, masked in zip(given.text.segments(), alone(given.masked), strict=True):
        s, t = system.text(masked).x, system.teacher.text(masked).x
        mine, theirs = system.words(s), system.teacher.words(t)
        for n in range(len(words)):
            p = (theirs[n] / 2).softmax(0)
            far.append(4 * (p * (p.log() - (mine[n] / 2).log_softmax(0))).sum())
            apart.append(1 - s[n] @ t[n] / s[n].norm() / t[n].norm())
            if masked.x[n] != words[n]:
                right.append(F.cross_entropy(mine[n], words[n]))
    torch.testing.assert_close(loss_of(system, given), sum(w * torch.stack(x).mean() for w, x in ((5, far), (2, right), (1, apart))))


def test_proto_clip():
    """Prototypes of means by clusters of the other side, soft targets, and no such loss before the second episode."""
    system, given, made = make("proto_clip"), whole(), torch.Generator().manual_seed(7)
    features = {side: F.normalize(torch.randn(20, 8, generator=made, dtype=torch.float64), dim=1) for side in ("image", "text")}
    system.before_episode({f"projected_{side}": x for side, x in features.items()})
    out = system.encode(given)
    found, total = system.objective(out, given), 0.0
    for student, teacher in (("image", "text"), ("text", "image")):
        centres = kmeans(features[teacher], 5, restarts=3)
        clusters = [[row for row in range(20) if torch.cdist(features[teacher][[row]], centres).argmin() == k] for k in range(5)]
        prototypes = torch.stack([features[student][rows].mean(0) if rows else torch.zeros(8).double() for rows in clusters])
        for x, y in zip(out[f"projected_{student}"], out[f"projected_{teacher}"], strict=True):
            target = (2 * centres @ centres[torch.cdist(y[None], centres).argmin()]).softmax(0)
            total -= target @ (prototypes @ x / 0.07).log_softmax(0) / 16
    torch.testing.assert_close(found["proto"], total)
    system.episodes.fill_(1)
    assert system.objective(out, given)["proto"] == 0


def test_dcd():
    """The hardest of the next captions by the teacher's logit, and both losses weighted by the doubt about each picture."""
    system, given = make("dcd"), whole()
    out, (scale, bias) = system.encode(given), system.scale()
    taught, scored = [], []
    for i, image in enumerate(alone(given.image)):
        def logit(j, image=image):
            p = system.teacher.score(image, given.text.take([j])).exp()
            return (p / (1 - p)).log()[0]

        others = sorted(((i + step) % 8 for step in range(1, 6)), key=lambda j: -logit(j))[:3]
        taught.append(torch.stack([logit(j) for j in (i, *others)]))
        scored.append(torch.stack([scale[0] * out["image"][i] @ out["text"][j] + bias[0] for j in (i, *others)]))
    T, S, label = torch.stack(taught).detach(), torch.stack(scored), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    doubt = -(T.softmax(1) * T.log_softmax(1)).sum(1)
    doubt = doubt / doubt.sum()
    trust = ((1 - doubt) ** 2).softmax(0)
    near = sum(trust[i] * F.mse_loss(S[i], T[i]) for i in range(8))
    right = sum(doubt[i] * F.binary_cross_entropy_with_logits(S[i], label) for i in range(8))
    torch.testing.assert_close(system.objective(out, given)["distilled"], 0.2 * near + 0.8 * right)


def test_align():
    system, given = make("align"), batch()
    out = system.encode(given)
    S, own = system.scale()[0] * out["image"] @ out["text"].T, torch.arange(4)
    expected = (F.cross_entropy(S, own, label_smoothing=0.1) + F.cross_entropy(S.T, own, label_smoothing=0.1)) / 2
    torch.testing.assert_close(system.objective(out, given)["contrastive"], expected)
