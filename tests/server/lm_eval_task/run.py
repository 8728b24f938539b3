"""Run as a script: lm-eval's local-completions over the tasks beside this file; what it asked and found, as JSON.

usage: run.py URL TOKENIZER MAX_LENGTH CONCURRENT OUT
"""

import json
import os
import sys

import lm_eval
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager


def main() -> None:
    url, tokenizer, length, concurrent, out = sys.argv[1:]
    folder = os.path.dirname(os.path.abspath(__file__))
    os.chdir(folder)  # the tasks name their data beside them
    asked = []
    original = LocalCompletionsAPI._loglikelihood_tokens

    def recorded(self, requests, **how):
        found = original(self, requests, **how)
        found = list(found)
        asked.extend([list(r[1]), list(r[2]), *f] for r, f in zip(requests, found, strict=True))
        return found

    LocalCompletionsAPI._loglikelihood_tokens = recorded
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "demo",
            "base_url": f"{url}/v1/completions",
            "tokenizer": tokenizer,
            "tokenizer_backend": "huggingface",
            "max_length": int(length),
            "num_concurrent": int(concurrent),
            "max_retries": 1,
        },
        tasks=["hasten_choice", "hasten_rolling"],
        task_manager=TaskManager(include_path=folder),
        bootstrap_iters=0,
    )
    with open(out, "w") as file:
        json.dump({"asked": asked, "results": results["results"], "version": lm_eval.__version__}, file)


main()
