"""Image-text pairs from WebDataset shards, as packed batches with a position that survives a restart."""

from fastvlp.data.batch import Batch as Batch
from fastvlp.data.batch import Stage as Stage
from fastvlp.data.patches import pack_images as pack_images
from fastvlp.data.patches import pack_texts as pack_texts
from fastvlp.data.shards import expand as expand
from fastvlp.data.stream import Stream as Stream
from fastvlp.data.tokenizer import Tokenizer as Tokenizer
from fastvlp.data.tokenizer import load_tokenizer as load_tokenizer
