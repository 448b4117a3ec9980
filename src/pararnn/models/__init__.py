"""Language models built on `pararnn.RNN`, as transformers models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pararnn.models import presets as presets
from pararnn.models.cache import LayerState as LayerState
from pararnn.models.cache import ParaRNNCache as ParaRNNCache
from pararnn.models.causal_loss import CausalLoss as CausalLoss
from pararnn.models.cells import CELLS as CELLS
from pararnn.models.cells import register_cell as register_cell
from pararnn.models.configuration import ParaRNNConfig as ParaRNNConfig
from pararnn.models.modeling import ParaRNNForCausalLM as ParaRNNForCausalLM
from pararnn.models.modeling import ParaRNNModel as ParaRNNModel
from pararnn.models.modeling import ParaRNNPreTrainedModel as ParaRNNPreTrainedModel

AutoConfig.register(ParaRNNConfig.model_type, ParaRNNConfig, exist_ok=True)
AutoModel.register(ParaRNNConfig, ParaRNNModel, exist_ok=True)
AutoModelForCausalLM.register(ParaRNNConfig, ParaRNNForCausalLM, exist_ok=True)
# Trainer's label smoothing and the pipelines look for the class by name: what shifts its labels
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ParaRNNConfig.model_type] = ParaRNNForCausalLM.__name__
