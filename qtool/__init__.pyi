from qtool.api import calibrate as calibrate
from qtool.api import evaluate as evaluate
from qtool.api import export as export
from qtool.api import load_recipe as load_recipe
from qtool.api import open_model as open_model
from qtool.api import plan as plan
from qtool.api import quantize as quantize
from qtool.errors import QtoolError as QtoolError
from qtool.pipeline.matrix import quantize_matrix as quantize_matrix

__version__: str
API: tuple[str, ...]
