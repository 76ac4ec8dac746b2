"""What every command line here shares."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks, and appends a flag's default to its help where it has one to name."""

    def _get_help_string(self, action: argparse.Action) -> str:
        names_a_value = action.default not in (None, False, argparse.SUPPRESS) and action.option_strings
        return super()._get_help_string(action) if names_a_value else action.help
