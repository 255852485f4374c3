"""What `hf-fusion serve` adds to `generate`, what batches gain, and whether 32 clients get the model's own answers.

    python tests/benchmarks/serve_load.py --model FOLDER                   # a language model with a chat template
    python tests/benchmarks/serve_load.py --model FOLDER --seconds 10 --output FILE

The server runs in another process with one thread, as does `generate` here; clients are OpenAI's. One client alone is
compared with `generate` on the same prompts, then 16 at once with one after the other, in the same run. Last, 32
clients ask for some time, and an error of any of them ends the run; each answer is compared with that of `generate` for
its prompt alone. Answers of batches may differ where two tokens are equally likely but for rounding: they are counted,
and looked at by their probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import openai
import torch
from transformers import AutoTokenizer

from hf_fusion import load_fused
from hf_fusion.evaluation.machine import machine

PROMPTS = [
    f"{ask}: {words}"
    for ask in ("Sort these words", "Reverse this list", "Name the first word", "Which word is the longest?")
    for words in ("pear, apple, fig", "river, stone, bird, cloud", "seven, two, nine", "red, violet, blue, grey, black")
]
TOKENS = 32
TIE = 0.02  # in nats: two tokens as likely as bfloat16's rounding in a batch can exchange


def messages(prompt: str) -> list[Any]:
    """A chat of one question."""
    return [{"role": "user", "content": prompt}]


class Own:
    """The model in this process."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.model: Any = load_fused(folder)[0]
        self.tokenizer = self.model.processor or AutoTokenizer.from_pretrained(folder)

    def inputs(self, prompt: str) -> Any:
        """The tokens of a chat."""
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return self.tokenizer.apply_chat_template(messages(prompt), **options)

    def answer(self, prompt: str) -> str:
        """What `generate` answers greedily."""
        given = self.inputs(prompt)
        ids = self.model.generate(**given, max_new_tokens=TOKENS, do_sample=False)[0, given["input_ids"].shape[1] :]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    @torch.no_grad()
    def is_tie(self, prompt: str, other: str) -> bool:
        """Whether another answer leaves the model's own at a token that is as likely."""
        start = self.inputs(prompt)["input_ids"]
        own, given = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (self.answer(prompt), other))
        same = next((i for i, (a, b) in enumerate(zip(own, given)) if a != b), min(len(own), len(given)))
        ids = torch.cat([start, torch.tensor([own[:same]], dtype=torch.long)], dim=1)
        likely = self.model(input_ids=ids).logits[0, -1].float().log_softmax(-1).topk(2).values
        return bool(likely[0] - likely[1] < TIE)


def serve(folder: str, port: int) -> subprocess.Popen[bytes]:
    """A server that is ready."""
    words = ["-c", "from hf_fusion.cli import main; main()", "serve", folder, "--port", str(port), "--name", "model"]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        for _ in range(120):
            try:
                client.models.list()
                return process
            except openai.APIConnectionError:
                time.sleep(1)
    raise RuntimeError("the server did not start")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a fused language model")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long 32 clients ask")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=8977)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    own, server = Own(args.model), serve(args.model, args.port)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none", max_retries=0)

        def ask(prompt: str) -> str:
            done = client.chat.completions.create(
                model="model", messages=messages(prompt), max_tokens=TOKENS, temperature=0
            )
            return done.choices[0].message.content or ""

        expected = {prompt: own.answer(prompt) for prompt in PROMPTS}
        ask(PROMPTS[0])
        times: dict[str, list[float]] = {"generate": [], "one client": [], "16 clients": []}
        for _ in range(args.repeats):
            for name, run in (
                ("generate", lambda: [own.answer(prompt) for prompt in PROMPTS]),
                ("one client", lambda: [ask(prompt) for prompt in PROMPTS]),
                ("16 clients", lambda: list(ThreadPoolExecutor(len(PROMPTS)).map(ask, PROMPTS))),
            ):
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
        least = {name: min(values) for name, values in times.items()}
        until, answers = time.perf_counter() + args.seconds, []

        def visit(number: int) -> list[tuple[str, str]]:
            found = []
            while time.perf_counter() < until:
                prompt = PROMPTS[(number + len(found)) % len(PROMPTS)]
                found.append((prompt, ask(prompt)))
            return found

        with ThreadPoolExecutor(32) as pool:
            for found in pool.map(visit, range(32)):
                answers += found
        other = [(prompt, answer) for prompt, answer in answers if answer != expected[prompt]]
        wrong = [pair for pair in set(other) if not own.is_tie(*pair)]
        result = {
            "command": f"python tests/benchmarks/serve_load.py --model FOLDER --seconds {args.seconds:g}",
            "machine": machine(),
            "model": type(own.model).__name__,
            "dtype": str(own.model.dtype),
            "tokens": TOKENS,
            "seconds": least,
            "overhead": least["one client"] / least["generate"],
            "throughput": least["one client"] / least["16 clients"],
            "load": {
                "clients": 32, "seconds": args.seconds, "answers": len(answers),
                "ties": len(other) - sum(pair in wrong for pair in other), "wrong": len(wrong),
            },
        }  # fmt: skip
    finally:
        server.terminate()
        server.wait(60)
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
