"""Table 6: several bases, each with its own adapter: BLEU and loss of what is read back, perplexity of what follows.

Where no adapter on another base is given, a tiny base with random weights shows that the form holds; its row is marked.
"""

from __future__ import annotations

from icae.base import Base, fingerprint, load_base
from icae.checkpoint import read_config
from icae.config import ICAEConfig
from icae.experiments.context import Context, hashes
from icae.experiments.following import follow
from icae.experiments.reading import bleus, losses, read_back
from icae.experiments.table import Cell, Column, Table, mean, perplexity
from icae.model import ICAE

NEEDS = ("main", "also", "text")
QUICK = {"samples": 8}
COLUMNS = [
    Column("base", "base"),
    Column("parameters", "parameters, millions", 1),
    Column("kind", "slots"),
    Column("ratio", "tokens a slot"),
    Column("samples", "samples"),
    Column("bleu", "BLEU", 1),
    Column("loss", "loss, nats a token"),
    Column("text", "perplexity from text", 2),
    Column("slots", "from slots", 2),
]


def run(context: Context, *, samples: int = 100, length: int = 128, context_length: int = 128, target: int = 64) -> Table:
    """Measure every base on as many windows of the same text, each drawn and counted in its own tokens."""
    notes = context.text_note()
    room = context.longest - target
    (context_length,) = context.within([context_length], room, "no document is longer, with what follows", notes)
    (length,) = context.within([length], context.longest, "no document is longer", notes)
    rows = [_row(context, context.main, context.base.name, samples, length, context_length, target)]
    for folder in context.also:
        base = load_base(read_config(folder).base, device=str(context.base.device), dtype=context.base.dtype)
        there = Context(base, {"main": folder}, context.text, seed=context.seed, polish=context.polish, say=context.say)
        rows.append(_row(there, there.main, base.name, samples, length, context_length, target))
    if not context.also:
        notes.append(
            "The second base has random weights and an untrained adapter: a check of the form alone. Give --also ADAPTER for others."
        )
        tiny = random_base(context.base)
        there = Context(tiny, {}, context.text, seed=context.seed, say=context.say)
        model = ICAE(tiny, ICAEConfig(lora_rank=4, lora_alpha=4, polish=context.polish)).eval()
        rows.append(_row(there, model, "random weights (form check)", samples, length, context_length, target))
    return Table("table6", COLUMNS, rows, notes, hashes(context.windows(length, samples)))


def _row(context: Context, model: ICAE, name: str, samples: int, length: int, context_length: int, target: int) -> dict[str, Cell]:
    texts = context.windows(length, samples)
    readings = read_back(context, model, texts)
    nll = follow(context, model, length=context_length, target=target, samples=samples)
    return {
        "base": name,
        "parameters": sum(p.numel() for p in model.base.model.parameters()) / 1e6,
        "kind": model.config.kind,
        "ratio": model.config.ratio,
        "samples": samples,
        "bleu": mean(bleus(model, readings, texts)),
        "loss": mean(losses(readings)),
        "text": perplexity(nll["text"]),
        "slots": perplexity(nll["slots"]),
    }


def random_base(like: Base) -> Base:
    """Make a tiny Llama with random weights and another base's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=like.model.get_input_embeddings().weight.shape[0],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=like.model.config.get_text_config().max_position_embeddings,
        bos_token_id=like.tokenizer.bos_token_id,
        eos_token_id=like.tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False).to(like.device)
    return Base(model, like.tokenizer, "random", fingerprint(model))
