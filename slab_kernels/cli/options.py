"""The options and arguments of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .meanings import access_token, finite, folder

# Of every command, or of many.

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; progress stays on stderr.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU if there is one.")]
Folder = Annotated[
    str,
    typer.Argument(metavar="DIR", help="A folder written by compress; a dense model works too."),
]
Packed = Annotated[str, typer.Argument(metavar="DIR", help="A folder written by compress.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", parser=folder, help="The folder to write.")]
Backend = Annotated[
    str | None, typer.Option(help="Force a backend; fails with every reason if it cannot run.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the activations: fp32, bf16 or fp16; default: the checkpoint's, fp32 on a CPU."
    ),
]
Prefill = Annotated[
    str | None,
    typer.Option(
        help="Dense copies of packed weights for many tokens, 16 bits per weight of GPU memory: "
        "packed (none), dense or auto; default $SLAB_KERNELS_PREFILL or packed."
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="How x enters the products of packed linears on a CPU: int8, which is faster for "
        "integer values and rounds x, or exact; default $SLAB_KERNELS_CPU_ACTIVATIONS or int8."
    ),
]
Text = Annotated[
    str,
    typer.Option(
        help="A text file, rows (.jsonl, .parquet), a folder of such files, a datasets name, or "
        "stdlib."
    ),
]
Field = Annotated[
    str | None,
    typer.Option(
        help="Of the rows of a .jsonl or .parquet file or a dataset, the one to read: a text, a "
        "chat or token ids; default: the first that is there of input_ids, text, messages, and "
        "prompt with completion."
    ),
]
Seed = Annotated[int, typer.Option(help="Which windows are drawn.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code in the model's folder; nothing asks for it later.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Of a model on the hub: a branch, a tag or a commit; default: main."),
]
Subfolder = Annotated[
    str | None,
    typer.Option(
        help="Where config.json lies in the model's repository or folder; default: the top."
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Of the hub, for private models; default: $HF_TOKEN or the login of `hf auth login`, "
        "neither of which others see in a list of processes.",
        callback=access_token,
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not compare what is read with its checksums.")
]

# Of compress.

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model folder or the name of one on the Hugging Face hub."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="A goal instead of its settings: small (int4, one plane) or balanced (int4, two "
        "planes; the default), both with int8 embeddings, or exact (fp16, two planes, dense "
        "embeddings)."
    ),
]
Method = Annotated[
    str,
    typer.Option(
        help="slab (ours), slab-paper, threebasil, hassle-free, sslc, oats, slim, eora, alps, "
        "sparsegpt, wanda or magnitude."
    ),
]
Pattern = Annotated[
    str, typer.Option(help="Keep n of m (2:4, 4:8) or remove a share (50%); only 2:4 is packed.")
]
SignRank = Annotated[
    int, typer.Option(help="Rank of the magnitudes of the sign term (slab methods).")
]
Planes = Annotated[
    int | None,
    typer.Option(
        help="Signs of a pruned entry, 1 to 3, each half a bit per weight (slab); default: the "
        "preset's, 1 for other methods."
    ),
]
StoredValues = Annotated[
    str | None,
    typer.Option(
        help="How kept values are stored: fp16, bf16, int8, int4 or int3; default: the preset's, "
        "fp16 for other methods."
    ),
]
StoredGroup = Annotated[
    str,
    typer.Option(
        help="Inputs that one scale of an integer type covers: 32, 64, 128; 0 = one scale per row; "
        "auto = the largest that divides a layer's inputs."
    ),
]
Embeddings = Annotated[
    str | None,
    typer.Option(
        help="The input embedding: dense, or int8 rows with one scale each, which a tied output "
        "head then shares; default: the preset's, dense for other methods."
    ),
]
Head = Annotated[
    bool | None,
    typer.Option(
        "--head/--no-head",
        help="Pack the output head like the other linears; default: the preset's, no for other "
        "methods.",
    ),
]
StoredAdapter = Annotated[
    int | None,
    typer.Option(help="Rank of the adapter P Qᵀ; default: the method's own, 0 = none.", min=0),
]
AdapterValues = Annotated[
    str, typer.Option(help="How P and Q are stored: int8 (one exponent per row) or fp16.")
]
Match = Annotated[
    int,
    typer.Option(
        help="Transformer matching: epochs of training each block's numbers towards the dense "
        "model.",
        min=0,
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Stored bits per weight over the whole model; chooses values, planes and rank by "
        "layer."
    ),
]
Heldout = Annotated[str | None, typer.Option(help="Measure held-out errors on this other text.")]
Samples = Annotated[
    int, typer.Option(help="Windows of calibration text, one in eight held back to judge by.")
]
Window = Annotated[
    int, typer.Option(help="Tokens in a window; the model's positions if they are fewer.")
]
ResumeInOut = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.")
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Leave these modules dense, '*.down_proj'; may be repeated."),
]
Permute = Annotated[
    bool,
    typer.Option(
        "--permute/--no-permute",
        help="Put channels into orders that suit the pattern; the model's function stays.",
    ),
]
SetByPattern = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATTERN:NAME=VALUE,...",
        help="Settings of their own for layers whose names a regular expression is found in, "
        "'mlp.down_proj:values=int8,planes=1'; of values, planes, rank, group_size, adapter_rank "
        "and adapter_values; may be repeated, and later ones win.",
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A setting of the method, name=value; may be repeated. `slab-kernels info --methods` "
        "lists them."
    ),
]

# Of train and decompress.

Steps = Annotated[int, typer.Option(help="Steps of Adam.")]
Batch = Annotated[int, typer.Option(help="Windows per step.")]
TrainingSamples = Annotated[
    int, typer.Option(help="Windows of text, one in sixteen held back to judge by.")
]
Rate = Annotated[float, typer.Option(help="Largest step.")]
NewAdapters = Annotated[
    int,
    typer.Option(help="Add adapters P Qᵀ of this rank to layers that have none.", min=0),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
DenseDtype = Annotated[
    str | None,
    typer.Option(help="Of the weights: fp32, bf16 or fp16; default: what config.json names."),
]

# Of eval and generate.

EvalWindow = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a window; default 2048, or the model's positions if fewer.", min=2
    ),
]
MaxTokens = Annotated[
    int, typer.Option(help="Evaluate only the first so many tokens; 0 = all.", min=0)
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="DENSE",
        help="Also compare every prediction with that of the dense model, folder or hub name: KL, "
        "most probable token, perplexity ratio. If it would take more than half of the free "
        "memory, one of its blocks is read at a time.",
    ),
]
AgainstRevision = Annotated[
    str | None, typer.Option(help="The --revision of the model of --against.")
]
AgainstSubfolder = Annotated[
    str | None, typer.Option(help="The --subfolder of the model of --against.")
]
Prompt = Annotated[str, typer.Option(help="The text to continue.")]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="Put the prompt into the tokenizer's chat template, as a question."
    ),
]
NewTokens = Annotated[int, typer.Option(help="New tokens.", min=1)]
Beside = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="DENSE",
        help="Let the dense model, folder or hub name, write beside it, and time both: tokens per "
        "second, and where the time of a decode step goes.",
    ),
]
Together = Annotated[
    int | None,
    typer.Option(
        "--batch", help="For --against: also time so many texts at once; default 8.", min=1
    ),
]
Temperature = Annotated[
    float, typer.Option(help="0 = always the most probable token.", min=0.0, callback=finite)
]
DrawSeed = Annotated[int, typer.Option(help="For temperature above 0.")]

# Of bench, tune and explain.

Shape = Annotated[str, typer.Option(help="out_features x in_features, for example 11008x4096.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(help="out_features x in_features, 11008x4096; may be repeated."),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(help="All linears of a well-known model, llama-2-7b; may be repeated."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "--layers",
        help="Linears of a well-known model, fused and not; may be repeated. Default llama-3-8b.",
    ),
]
Fused = Annotated[
    bool,
    typer.Option(
        "--fused/--separate",
        help="--layers with q, k, v and gate, up in one, as engines run them.",
    ),
]
Tokens = Annotated[int, typer.Option(help="Tokens at once.", min=1)]
BenchTokens = Annotated[
    list[int] | None, typer.Option(help="Tokens at once; may be repeated. Default 1.", min=1)
]
TuneTokens = Annotated[
    list[int] | None,
    typer.Option(help="Tokens at once; may be repeated. Default 1, 16, 64, 512, 2048.", min=1),
]
Values = Annotated[str, typer.Option(help="fp16, bf16, int8, int4 or int3.")]
BenchValues = Annotated[
    list[str] | None,
    typer.Option(help="fp16, bf16, int8, int4, int3; may be repeated. Default fp16."),
]
TuneValues = Annotated[
    list[str] | None,
    typer.Option(help="fp16, bf16, int8, int4; may be repeated. Default fp16, int8, int4."),
]
BenchDtype = Annotated[
    str, typer.Option(help="Of the activations and the dense weight: fp32, bf16 or fp16.")
]
ActivationDtype = Annotated[str, typer.Option(help="Of the activations: fp32, bf16 or fp16.")]
Rank = Annotated[int, typer.Option(help="Rank of the sign term; 0 = none.", min=0)]
TuneRank = Annotated[
    int, typer.Option(help="Rank of the sign term, and lower ones; 0 = none.", min=0)
]
AdapterRank = Annotated[int, typer.Option(help="Rank of the adapter P Qᵀ; 0 = none.", min=0)]
GroupSize = Annotated[
    int, typer.Option(help="Inputs that one scale covers; 0 = one scale per row.")
]
BenchBackends = Annotated[
    list[str] | None,
    typer.Option(help="Time these; default: every one that runs it, without the reference."),
]
BenchActivations = Annotated[
    list[str] | None,
    typer.Option(
        help="How x enters our products on a CPU: exact or int8; may be repeated. Default "
        "$SLAB_KERNELS_CPU_ACTIVATIONS or int8."
    ),
]
Peers = Annotated[
    bool,
    typer.Option("--peers/--no-peers", help="Also other libraries' kernels, where installed."),
]
RowSeconds = Annotated[
    float,
    typer.Option(help="Time spent on a row, at least.", min=0.0, callback=finite),
]
Rounds = Annotated[
    int,
    typer.Option(
        help="Time everything so often; the fastest counts. For machines that others use.", min=1
    ),
]
TileSeconds = Annotated[
    float,
    typer.Option(help="Time spent on a configuration, at least.", min=0.0, callback=finite),
]
ConfigFolder = Annotated[
    Path | None,
    typer.Option(
        help="The folder to write; default $SLAB_KERNELS_CONFIGS or ~/.config/slab_kernels."
    ),
]
PlannedGpu = Annotated[
    str | None,
    typer.Option(help="Also the CUDA kernels' plan on a GPU that need not be here: A100, H200."),
]

# Of info and report.

Support = Annotated[
    bool,
    typer.Option("--support", help="Instead: what every backend runs, on whatever machine."),
]
Methods = Annotated[
    bool,
    typer.Option(
        "--methods",
        help="Instead: every method and its settings, as compress --option takes them.",
    ),
]
ReportPaths = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH...",
        help="Run folders, or JSON of eval, inspect, bench, the demo or another benchmark.",
    ),
]
ReportOut = Annotated[
    Path,
    typer.Option(metavar="PATH", parser=folder, help="Where the PNG files and report.html go."),
]
Dense = Annotated[
    str | None,
    typer.Option(
        help="The model that the run folders were compressed from, folder or hub name: adds its "
        "size, and heat maps of a weight."
    ),
]
DenseRevision = Annotated[str | None, typer.Option(help="The --revision of the model of --dense.")]
DenseSubfolder = Annotated[
    str | None, typer.Option(help="The --subfolder of the model of --dense.")
]
Plots = Annotated[
    bool, typer.Option("--plots/--no-plots", help="Without plots matplotlib is not needed.")
]
