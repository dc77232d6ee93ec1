"""What every rank of a test needs, loaded once in the fork server that ranks are forked from."""

import torch.distributed  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401 - all of these are for the children
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, conversion_mapping  # noqa: F401

from meft.runtime.cli import run  # noqa: F401
from meft.runtime.host import kernels
from meft.runtime.ranks import ordered
from meft.runtime.training import runner  # noqa: F401

kernels.warm_up(lambda _: None)
ordered.warm_up()
conversion_mapping.get_checkpoint_conversion_mapping("llama")  # a thousand expressions that every process would compile
