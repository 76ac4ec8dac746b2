"""The benchmark's tables and its picture."""

import platform
from html import escape
from importlib.metadata import version

BAR_WIDTH, ROW_HEIGHT, LABEL_WIDTH = 360, 30, 270


def conditions(args) -> str:
    """Machine, versions and settings in a line."""
    return (
        f"{args.device} ({platform.machine()}), Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}; hidden_size {args.hidden_size}, batch_size {args.batch_size}, "
        f"max_seq_len {args.max_seq_len}, {args.num_workers} workers, medians of {args.repeats} rounds of {args.steps} steps"
    )


def print_train(args, results: dict[str, dict]):
    plain = next(iter(results.values()))
    print(f"training, {args.stage}: {conditions(args)}")
    product = plain["matrix_product_flops"]
    print(f"matrix product here: {product / 1e9:,.0f} GFLOP/s")
    head = ("samples/s", "x plain", "useful tok/s", "useful", "of product", "peak GB", "x plain", "data wait")
    print(f"  {'':<34}" + "".join(f"{name:>13}" for name in head))
    for name, row in results.items():
        cells = (
            f"{row['samples_per_second']:.2f}",
            f"{row['samples_per_second'] / plain['samples_per_second']:.2f}",
            f"{row['useful_tokens_per_second']:,.0f}",
            f"{row['useful_share']:.1%}",
            f"{row['share_of_matrix_product']:.1%}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['peak_bytes'] / plain['peak_bytes']:.0%}",
            f"{row['data_wait']:.1%}",
        )
        print(f"  {name:<34}" + "".join(f"{cell:>13}" for cell in cells))
    print()


def print_loader(args, results: dict[str, dict]):
    plain = results["loader, plain"]["pictures_per_second"]
    print(f"the loader alone: {conditions(args)}")
    for name, row in results.items():
        speed = row["pictures_per_second"]
        print(f"  {name:<34}{speed:>13,.0f} pictures/s{speed / plain:>10.2f} x plain")
    print()


def print_generate(args, figures: dict[str, float]):
    print(f"generation, 64 tokens after a prompt of 230: {conditions(args)}")
    for batch in (1, 16):
        ours, llama = figures[f"this_project_batch_{batch}"], figures[f"llama_batch_{batch}"]
        print(
            f"  batch {batch:<3} this project {ours:>8,.0f} tokens/s, transformers' Llama of the same size {llama:>8,.0f} "
            f"tokens/s, in turns {figures[f'ratio_batch_{batch}']:.2f} x"
        )
    print()


def write_svg(args, results: dict[str, dict]):
    """Draws samples/s of each line as bars, into args.svg; readable in light and dark."""
    plain = next(iter(results.values()))["samples_per_second"]
    most = max(row["samples_per_second"] for row in results.values())
    rows = []
    for number, (name, row) in enumerate(results.items()):
        top, speed = 56 + ROW_HEIGHT * number, row["samples_per_second"]
        width = BAR_WIDTH * speed / most
        rows.append(
            f'<text x="{LABEL_WIDTH - 10}" y="{top + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{LABEL_WIDTH}" y="{top}" width="{width:.1f}" height="{ROW_HEIGHT - 8}" rx="2"/>'
            f'<text x="{LABEL_WIDTH + width + 8:.1f}" y="{top + 15}">{speed:.2f} ({speed / plain:.2f} x)</text>'
        )
    height, width = 80 + ROW_HEIGHT * len(results), LABEL_WIDTH + BAR_WIDTH + 130
    title = f"samples/s, {args.stage}, hidden_size {args.hidden_size}, batch_size {args.batch_size}, {args.device}"
    args.svg.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">'
        "<style>text{fill:#222}rect{fill:#3b6ea5}svg{background:#fff}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}rect{fill:#7fb2e5}svg{background:#111}}</style>"
        f'<text x="16" y="30" font-size="15" font-weight="bold">{escape(title)}</text>{"".join(rows)}</svg>\n',
        encoding="utf-8",
    )
