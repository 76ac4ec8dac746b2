"""A web page to talk to a trained model about pictures, and to see which parts of them each word depended on.

    python scripts/web_demo_vlm.py              http://127.0.0.1:7860
    python scripts/web_demo_vlm.py --weight pretrain_vlm --port 8000

It needs: pip install -r scripts/requirements-demo.txt. Only this machine can
open the page unless --host or --share say otherwise. An upload stays on the
disk until it was asked about, an hour or so at most and within bounds
(scripts/demo/guard.py); then in memory, until its conversation is closed.
"""

import os
import signal
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, HelpFormatter, number, temperature
from common.errors import Stopped, UsageError, run_script
from dataset.tokenizer import quiet_libraries
from scripts.demo.chat import CLOSING, LARGEST_FILE, MOST_PICTURES, Models
from trainer.answering.assistant import add_speed_flags
from trainer.answering.loaded_model import add_model_flags
from trainer.support.processes import Processes
from trainer.support.signals import SIGNALS


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_speed_flags(add_model_flags(parser))
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others on your network in")
    add("--port", type=number(int, 0, 65535), default=7860, help="port to listen on")
    add("--share", action="store_true", help="a public address for a few days, through gradio's servers")
    what = "initial value of its slider"
    default = "(default: as the published model's recipe)"
    add("--temperature", type=temperature, help=f"{what}; 0: always the likeliest token {default}")
    add("--top_p", type=number(float, 1e-3, 1), help=f"{what} {default}")
    add("--max_new_tokens", type=number(int, 1), default=256, help=what)
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    try:
        from scripts.demo.guard import Guard, Uploads, is_loopback
        from scripts.demo.page import LABELS, build_page
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "starlette"):
            raise
        raise UsageError("the web page needs a package: pip install -r scripts/requirements-demo.txt") from error
    for which in SIGNALS:
        if which != signal.SIGINT and signal.getsignal(which) is not signal.SIG_IGN:
            signal.signal(which, leave)
    with Processes.start(args.device) as processes, tempfile.TemporaryDirectory() as folder:
        quiet_libraries(True)
        uploads, examples = Uploads(Path(folder).resolve() / "uploads"), Path(folder).resolve() / "examples"
        examples.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
        page = build_page(Models(args, processes.device, examples), uploads)
        is_local = is_loopback(args.host) and not args.share
        guard = (Guard, (uploads, MOST_PICTURES * LARGEST_FILE, is_local), {})
        css = Path(__file__).with_name("demo").joinpath("page.css").read_text(encoding="utf-8")
        try:
            page.launch(
                server_name=args.host,
                server_port=args.port,
                share=args.share,
                i18n=LABELS,
                max_file_size=LARGEST_FILE,
                css=css,
                app_kwargs={"middleware": [guard]},
                footer_links=[],
                show_error=False,
            )
        except OSError as error:
            raise UsageError(f"--port {args.port} cannot be used ({error}): choose another") from error
        finally:
            CLOSING.set()
            if page.server:
                page.server.force_exit = True  # browsers hold connections open
            page.close(verbose=False)  # before the uploads' folder goes


def leave(number: int, frame):
    raise Stopped(number)


if __name__ == "__main__":
    run_script(main)
