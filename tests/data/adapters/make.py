"""Make the files in this folder: tiny adapters as the programs save them that the tests do not install.

Each was written by the library that its folder is named after; run ``python make.py LIBRARY`` in an environment that has it:

    lycoris      lycoris-lora 4.1.3
    mlx          mlx 0.32.4 (mlx-cpu), mlx-lm 0.32.2
    adapterhub   adapters 1.3.0, transformers 4.57
    diffusers    diffusers 0.42.1, peft 0.21.2
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent


def lycoris() -> None:
    """One file an algorithm, for a linear layer, a convolution and, where it is trained, a norm."""
    import torch
    from lycoris import LycorisNetwork, create_lycoris

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(6, 4)
            self.conv = torch.nn.Conv2d(4, 4, 3)
            self.norm = torch.nn.LayerNorm(4)

    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    for name, algorithm in {
        "loha": {"algo": "loha"},
        "lokr": {"algo": "lokr", "factor": 2},
        "locon": {"algo": "lora"},
        "dora": {"algo": "lora", "dora_wd": True},
        "full": {"algo": "full"},
        "ia3": {"algo": "ia3"},
        "oft": {"algo": "diag-oft"},
        "boft": {"algo": "boft"},
        "glora": {"algo": "glora"},
    }.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.add_module("block", Block())
        network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, conv_dim=2, conv_alpha=1, **algorithm)
        network.apply_to()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        (HERE / "lycoris").mkdir(exist_ok=True)
        network.save_weights(
            str(HERE / "lycoris" / f"{name}.safetensors"), torch.float32, {"ss_network_module": "lycoris.kohya"}
        )


def mlx() -> None:
    """A folder for each of mlx-lm's ``fine_tune_type``."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    for kind in ("lora", "dora", "full"):
        mx.random.seed(0)
        model = Model(
            ModelArgs(
                model_type="llama", hidden_size=8, num_hidden_layers=2, intermediate_size=12, num_attention_heads=2,
                rms_norm_eps=1e-5, vocab_size=16,
            )
        )  # fmt: skip
        model.freeze()
        parameters = {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
        if kind == "full":
            model.layers[-1].self_attn.unfreeze()
        else:
            linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
        folder = HERE / "mlx" / kind
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        facts = {
            "fine_tune_type": kind,
            "num_layers": 2,
            "lora_parameters": parameters,
            "model": "mlx-community/tiny-llama",
        }
        save_config(facts, folder / "adapter_config.json")


def adapterhub() -> None:
    """A folder for each of some architectures of the adapters library."""
    import adapters
    import transformers

    config = transformers.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    for name, settings in {
        "lora": adapters.LoRAConfig(r=2, alpha=4),
        "dora": adapters.LoRAConfig(r=2, alpha=4, use_dora=True),
        "ia3": adapters.IA3Config(),
        "bottleneck": adapters.SeqBnConfig(reduction_factor=4),
        "prompt_tuning": adapters.PromptTuningConfig(prompt_length=3),
        "union": adapters.ConfigUnion(adapters.LoRAConfig(r=2), adapters.SeqBnConfig(reduction_factor=4)),
    }.items():
        transformers.set_seed(0)
        model = transformers.BertModel(config)
        adapters.init(model)
        model.config._name_or_path = "bert-base-uncased"
        model.add_adapter("pirate", config=settings)
        (HERE / "adapterhub").mkdir(exist_ok=True)
        model.save_adapter(str(HERE / "adapterhub" / name), "pirate", use_safetensors=True)


def diffusers() -> None:
    """What one component saves of itself, and what a pipeline saves of two."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=4, attention_head_dim=2,
    )  # fmt: skip
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["attn1.to_q", "attn1.to_out.0"], alpha_pattern={"to_out.0": 6})
    )
    unet.save_lora_adapter(HERE / "diffusers" / "unet")
    text = get_peft_model(
        CLIPTextModel(
            CLIPTextConfig(vocab_size=16, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        ),
        LoraConfig(r=1, lora_alpha=3, target_modules=["q_proj"], use_rslora=False),
    )  # fmt: skip
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        HERE / "diffusers" / "pipeline",
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers={
            key.removeprefix("base_model.model."): tensor for key, tensor in get_peft_model_state_dict(text).items()
        },
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=text.peft_config["default"].to_dict(),
    )


if __name__ == "__main__":
    {each.__name__: each for each in (lycoris, mlx, adapterhub, diffusers)}[sys.argv[1]]()
