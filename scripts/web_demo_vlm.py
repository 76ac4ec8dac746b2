"""A web page to talk to a trained model about pictures, and to see which parts of them each word depended on.

    python scripts/web_demo_vlm.py              http://127.0.0.1:7860
    python scripts/web_demo_vlm.py --weight pretrain_vlm --port 8000

It needs: pip install -r scripts/requirements-demo.txt. Only this machine can open the page unless --host or --share say
otherwise. An upload is deleted from the disk once it was asked about, after an hour, or when there are too many
(scripts/demo/page.py); it stays in memory until its conversation is closed.
"""

import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, number
from common.errors import Stopped, UsageError, run_script
from common.paths import EXAMPLE_PHOTO
from dataset.file_kinds import quiet_libraries
from dataset.scenes.draw import draw_heldout
from trainer.answering.assistant import Assistant, add_generation_flags, add_model_flags, find_model
from trainer.support.processes import Processes, stop_signals

LARGEST_FILE = 20 * 2**20  # bytes
EXAMPLES = 6


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__, imports=True)
    add_model_flags(parser, runs=True)
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others on your network in")
    add("--port", type=number(int, 0, 65535), default=7860, help="port to listen on")
    add("--share", action="store_true", help="a public address for a few days, through gradio's servers")
    add_generation_flags(parser.add_argument_group("initial values of the settings"), max_new_tokens=256)
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    try:
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from scripts.demo.page import CLOSING, LABELS, MOST_PICTURES, Guard, Handlers, Uploads, build_page, is_loopback
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}: pip install -r scripts/requirements-demo.txt") from error
    with Processes.start(args.device) as processes, tempfile.TemporaryDirectory() as folder:
        quiet_libraries(True)
        folder, loaded = Path(folder).resolve(), find_model(args)
        uploads, photos = Uploads(folder / "uploads"), sorted(EXAMPLE_PHOTO.parent.iterdir())[:EXAMPLES]
        os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
        examples = draw_heldout(folder / "examples", EXAMPLES) if loaded.knows_only_scenes else photos
        assistant = Assistant(loaded, processes.device, args.dtype, args.compile, args.open_thinking)
        page = build_page(Handlers(assistant, loaded.sampling(args), examples, uploads), args.max_new_tokens)
        try:
            is_local = not args.share and is_loopback(args.host)
            # Under another name than this machine's own, a site may resolve to it (DNS rebinding).
            hosts = ["localhost", "127.0.0.1", "::1"] if is_local else ["*"]
            guard = (Guard, (uploads, MOST_PICTURES * LARGEST_FILE, is_local), {})
            address = {"server_name": args.host, "server_port": args.port, "share": args.share}
            looks = {"i18n": LABELS, "css_paths": Path(__file__).parent / "demo/page.css", "footer_links": []}
            limits = {"max_file_size": LARGEST_FILE, "show_error": False}
            limits["app_kwargs"] = {"middleware": [(TrustedHostMiddleware, (hosts,), {}), guard]}
            with stop_signals(speaks=False) as signals:
                page.launch(**address, **looks, **limits, prevent_thread_lock=True)
                while signals.asked is None:
                    time.sleep(0.1)
        except OSError as error:
            raise UsageError(f"--host {args.host} --port {args.port} cannot be used ({error})") from error
        finally:
            CLOSING.set()
            page.close(verbose=False)  # before the uploads' folder goes
    if signals.asked != signal.SIGINT:
        raise Stopped(signals.asked)


if __name__ == "__main__":
    run_script(main)
