"""Run in a process of its own: ``import cospadi``, then load packed folders without ``trust_remote_code``.

``python with_package.py PACKED SAVED UNKNOWN_VERSION RESULT``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cospadi  # noqa: F401 (the import is what is tested)


def main(packed_folder, saved_folder, unknown_version, result_path):
    result = {"light": sorted({"torch", "transformers", "numba"} & sys.modules.keys())}

    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from cospadi.runtime.configuration_cospadi import register

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ids = torch.randint(3, 390, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(packed_folder)
        logits = plain(ids).logits
        # the package is preferred to the folder's code, and neither breaks the other
        trusted = AutoModelForCausalLM.from_pretrained(packed_folder, trust_remote_code=True)
        register()
        again = AutoModelForCausalLM.from_pretrained(packed_folder)
        result["class"] = [type(model).__module__ for model in (plain, trusted, again)]
        result["error"] = [float((model(ids).logits - logits).abs().max()) for model in (trusted, again)]
    result["printed"] = repr(plain.config)
    plain.save_pretrained(saved_folder)
    result["saved"] = sorted(path.name for path in Path(saved_folder).iterdir())
    result["auto_map"] = json.loads((Path(saved_folder) / "config.json").read_text())["auto_map"]
    try:
        AutoModelForCausalLM.from_pretrained(unknown_version)
    except ValueError as error:
        result["unknown_version"] = str(error)

    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=packed_folder, device="cpu", batch_size=1)
    result["evaluated"] = type(model.model).__name__
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
