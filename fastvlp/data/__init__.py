"""Samples from shards as batches of streams, with a position that survives a restart."""

from fastvlp.data.batch import Batch as Batch
from fastvlp.data.batch import Stage as Stage
from fastvlp.data.fields import Caption as Caption
from fastvlp.data.fields import Field as Field
from fastvlp.data.fields import Frames as Frames
from fastvlp.data.fields import Image as Image
from fastvlp.data.fields import Label as Label
from fastvlp.data.fields import Other as Other
from fastvlp.data.fields import Pages as Pages
from fastvlp.data.fields import Regions as Regions
from fastvlp.data.fields import Vector as Vector
from fastvlp.data.patches import pack_images as pack_images
from fastvlp.data.patches import pack_texts as pack_texts
from fastvlp.data.shards import expand as expand
from fastvlp.data.stream import Source as Source
from fastvlp.data.stream import Stream as Stream
from fastvlp.data.tokenizer import Tokenizer as Tokenizer
from fastvlp.data.tokenizer import load_tokenizer as load_tokenizer
