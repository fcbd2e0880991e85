"""Adapters that a rotation would break, or that are not LoRA: refused as a state dict and as a folder."""

import peft
import pytest
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig

import fedrot

from ..peft_models import Layers, bert, llama
from ..refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


@pytest.mark.parametrize("targets", [(["query"], ["query"]), (["query"], ["value"])])
def test_two_adapters_in_one_state_dict_are_refused(targets):
    first, second = (peft.LoraConfig(r=4, target_modules=modules) for modules in targets)
    model = peft.get_peft_model(bert(), first)
    model.add_adapter("second", second)
    both = {key: x for key, x in model.state_dict().items() if "lora_" in key}
    with refused("client 0", "lora_A.default", "lora_A.second", "two adapters"):
        fedrot.aggregate([both])


ATTENTION = {"r": 4, "target_modules": ["query", "value"]}
# The base model, what PEFT makes of it, and what the error must name: for the state dict, and for the folder.
OTHER_TUNERS = {
    "grouped convolution": (Layers, peft.LoraConfig(r=4, target_modules=["grouped"]), "(8, 1, 1, 1)", "(8, 1, 1, 1)"),
    "KaSA": (bert, peft.LoraConfig(**ATTENTION, kasa_config=peft.KasaConfig()), "query.lora_diag", "kasa_config"),
    "MonteCLoRA": (
        bert,
        peft.LoraConfig(**ATTENTION, monteclora_config=MontecloraConfig()),
        "query.lora_monteclora_sampler",
        "monteclora_config",
    ),
    "block-diagonal": (
        bert,
        peft.LoraConfig(**ATTENTION, use_bdlora=BdLoraConfig(target_modules_bd_b=["query", "value"], nblocks=2)),
        "(16, 2)",
        "use_bdlora",
    ),
    "AdaLoRA": (bert, peft.AdaLoraConfig(init_r=4, target_modules=["query"], total_step=10), "query.lora_E", "ADALORA"),
    "IA3": (bert, peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "lora_A", "IA3"),
    "VeRA": (bert, peft.VeraConfig(**ATTENTION), "lora_A", "VERA"),
    "LoHa": (bert, peft.LoHaConfig(**ATTENTION), "lora_A", "LOHA"),
    "LoKr": (bert, peft.LoKrConfig(**ATTENTION), "lora_A", "LOKR"),
    "prompt tuning": (
        llama,
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "lora_A",
        "PROMPT_TUNING",
    ),
}


@pytest.mark.parametrize(("base", "config", "in_update", "in_folder"), OTHER_TUNERS.values(), ids=OTHER_TUNERS)
def test_what_other_tuners_train_is_refused(base, config, in_update, in_folder, tmp_path):
    model = peft.get_peft_model(base(), config)
    update = peft.get_peft_model_state_dict(model)
    with refused("client 0", in_update):
        fedrot.aggregate([update, update])
    model.save_pretrained(tmp_path / "adapter")
    with refused("client 0", tmp_path / "adapter", in_folder):
        fedrot.aggregate([tmp_path / "adapter"] * 2)
