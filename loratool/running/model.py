"""Loading a model, its tokenizer and an adapter through transformers and PEFT, from safetensors only and without their output.

No code that comes with a model is executed (``trust_remote_code`` is False everywhere), and nothing is downloaded.

On a CPU everything is computed in fp32, whatever the stored dtype. On SmolLM2-135M and 80 short chats, that gives the fp64
loss to 2e-7 nats and takes a quarter less time than bf16, whose loss is off by 1e-3. bitsandbytes' NF4 kernel for CPUs with
AVX512-BF16 is off by 2e-3, and would give the same model different losses on different CPUs. On CUDA, the stored dtype is
the compute dtype; an NF4 model names its own.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import CheckpointError, LoratoolError, PlacementError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.write import write_peft

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_NAME: Final = "default"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Import transformers and PEFT, and silence their warnings, load reports and progress bars inside this context.

    Raises:
        LoratoolError: they are not installed.
    """
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import accelerate  # noqa: F401
            import peft  # noqa: F401
            from transformers.utils import logging as chatter
        except ImportError as error:
            raise LoratoolError(
                f"this needs packages that are not installed ({error}); pip install 'loratool[train]'"
            ) from None
        verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
        chatter.set_verbosity(logging.CRITICAL)
        chatter.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            chatter.set_verbosity(verbosity)
            if bars:
                chatter.enable_progress_bar()  # type: ignore[no-untyped-call]
            bitsandbytes.setLevel(level)


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of the model in `folder`.

    Raises:
        CheckpointError: transformers cannot read it.
        UnsupportedError: its weights are quantized by a library other than bitsandbytes.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a file can make a library raise
        raise _not_loaded("the configuration of", folder, error) from None
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and str(method) != "bitsandbytes":
        raise UnsupportedError(
            f"{quoted(folder)} is quantized by {quoted(method)}, but loratool runs only dense and bitsandbytes models"
        )
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model in `folder`.

    Raises:
        CheckpointError: there is no tokenizer, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever a file can make a library raise
        raise _not_loaded("the tokenizer of", folder, error) from None
    return tokenizer


def load_model(folder: Path, config: PreTrainedConfig, device: str, *, quantize: bool = False) -> PreTrainedModel:
    """Load the causal language model in `folder` on `device` (``cpu`` or ``cuda:N``), in evaluation mode.

    Parameters are fp32 on a CPU and keep their stored dtype on CUDA. NF4 weights stay packed on both. With `quantize`,
    bitsandbytes quantizes the linear layers of a dense model to NF4 with double quantization; they compute in bf16 on CUDA
    and in fp32 on a CPU.

    Raises:
        CheckpointError: transformers cannot load it, or the folder lacks some of its weights.
    """
    from transformers import AutoModelForCausalLM

    on_cpu = device == "cpu"
    loader: Any = AutoModelForCausalLM  # its type hints lack the loading report
    try:
        model, report = loader.from_pretrained(
            folder,
            config=config,
            dtype="float32" if on_cpu else "auto",
            device_map=None if on_cpu and not quantize else {"": device},
            **({"quantization_config": _nf4(on_cpu=on_cpu)} if quantize else {}),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a file can make a library raise
        raise _not_loaded("the model", folder, error) from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{quoted(folder)} lacks {len(missing):,} tensors of a {type(model).__name__}, such as "
            f"{quoted(missing[0])}; give a complete causal language model"
        )
    if on_cpu and (quantize or getattr(config, "quantization_config", None) is not None):
        _compute_in_fp32(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _nf4(*, on_cpu: bool) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if on_cpu else torch.bfloat16,
    )


def _compute_in_fp32(model: PreTrainedModel) -> None:
    """Convert to fp32 what transformers leaves in the stored dtype of an NF4 model: other weights, and the compute dtype."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False  # otherwise its bf16 kernel ignores the compute dtype
            if isinstance(module.weight, Params4bit) and module.weight.quant_state is not None:
                module.weight.quant_state.dtype = torch.float32


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the most tokens that the model can read at once, or None if its configuration names no limit."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def put_beside(model: PreTrainedModel, adapter: Adapter, device: str) -> PeftModel:
    """Wrap the model's modules in place so that PEFT computes ``W x + scaling * B (A x)``, with fp32 factors; return it.

    Raises:
        PlacementError: not every tensor of the adapter lands on the model.
    """
    from peft import LoraConfig, PeftModel

    # PEFT would act on the adapter's task and initialisation, which do not matter here.
    config = {**adapter.config, "task_type": "CAUSAL_LM", "init_lora_weights": True, "inference_mode": True}
    with tempfile.TemporaryDirectory(prefix="loratool-") as parent:
        folder = Path(parent) / "adapter"
        write_peft(replace(adapter, config=config), folder)
        try:
            wrapped = PeftModel(model, LoraConfig.from_pretrained(str(folder)), ADAPTER_NAME)
            landed = wrapped.load_adapter(
                folder,
                ADAPTER_NAME,
                torch_device=device,
                key_mapping=getattr(model, "_checkpoint_conversion_mapping", None),
            )
        except (ValueError, RuntimeError) as error:
            raise PlacementError(_unfit(adapter, _one_line(error))) from None
    if landed.unexpected_keys:
        name = quoted(sorted(landed.unexpected_keys)[0])
        raise PlacementError(
            _unfit(adapter, f"{len(landed.unexpected_keys):,} of its tensors have no place, such as {name}")
        )
    return wrapped.eval()


@contextmanager
def beside(model: PreTrainedModel, adapter: Adapter, device: str) -> Iterator[PeftModel]:
    """Put the adapter beside the model's weights inside this context (see `put_beside`), and remove it afterwards."""
    wrapped = put_beside(model, adapter, device)
    try:
        yield wrapped
    finally:
        wrapped.unload()


def _unfit(adapter: Adapter, problem: str) -> str:
    return f"{quoted(adapter.name)} does not fit the model ({problem}); give the model it was trained on"


def _not_loaded(what: str, folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"transformers cannot load {what} {quoted(folder)} ({_one_line(error)}); give a complete model folder with its "
        "config.json, safetensors and tokenizer"
    )


def _one_line(error: Exception, limit: int = 240) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
