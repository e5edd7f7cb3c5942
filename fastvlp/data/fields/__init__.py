"""What a batch holds of each sample: small frozen objects, one for each stream, that turn samples into tensors where they are read."""

from .caption import Caption as Caption
from .field import Field as Field
from .field import Other as Other
from .field import Record as Record
from .field import bind as bind
from .image import Frames as Frames
from .image import Image as Image
from .image import Pages as Pages
from .image import Regions as Regions
from .noisy import Noisy as Noisy
from .resolutions import Resolutions as Resolutions
from .values import Label as Label
from .values import Uniform as Uniform
from .values import Vector as Vector
