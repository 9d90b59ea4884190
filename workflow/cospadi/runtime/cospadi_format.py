"""Names and numbers of the checkpoint format that its writer and its reader share."""

MODEL_TYPE = "cospadi"
FORMAT_VERSION = 1

AUTO_MAP = {
    "AutoConfig": "configuration_cospadi.CospadiConfig",
    "AutoModelForCausalLM": "modeling_cospadi.CospadiForCausalLM",
}

# Stands in config.json where transformers looks for a weight file's name. A loader that does not know this format (say,
# `LlamaForCausalLM.from_pretrained`) stops on it with this text; without it, it would start with random weights.
LOAD_HINT = "packed checkpoint: use AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
