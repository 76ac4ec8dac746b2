"""What every command line here shares."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks, and appends a flag's default to its help where it has one to name."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_empty = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        return action.help if is_empty or not action.option_strings else super()._get_help_string(action)
