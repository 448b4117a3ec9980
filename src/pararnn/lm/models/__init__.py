"""Language models built on `pararnn.RNN`, as transformers models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pararnn.lm.catalogue import CELLS as CELLS
from pararnn.lm.catalogue import MEMORIES as MEMORIES
from pararnn.lm.catalogue import register_cell as register_cell
from pararnn.lm.catalogue import register_memory as register_memory
from pararnn.lm.models import presets as presets
from pararnn.lm.models.cache import LayerState as LayerState
from pararnn.lm.models.cache import ParaRNNCache as ParaRNNCache
from pararnn.lm.models.causal_loss import CausalLoss as CausalLoss
from pararnn.lm.models.configuration import ParaRNNConfig as ParaRNNConfig
from pararnn.lm.models.modeling import ParaRNNForCausalLM as ParaRNNForCausalLM
from pararnn.lm.models.modeling import ParaRNNModel as ParaRNNModel
from pararnn.lm.models.modeling import ParaRNNPreTrainedModel as ParaRNNPreTrainedModel
from pararnn.lm.models.own_cells import import_cell as import_cell
from pararnn.lm.models.own_cells import import_cells as import_cells

AutoConfig.register(ParaRNNConfig.model_type, ParaRNNConfig, exist_ok=True)
AutoModel.register(ParaRNNConfig, ParaRNNModel, exist_ok=True)
AutoModelForCausalLM.register(ParaRNNConfig, ParaRNNForCausalLM, exist_ok=True)
# Trainer's label smoothing and the pipelines look up by name which classes shift their labels
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ParaRNNConfig.model_type] = ParaRNNForCausalLM.__name__
