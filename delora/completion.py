"""Shell completion: Hydra's own, which does not look into the folders of a group, and here does."""

from hydra.plugins.completion_plugin import CompletionPlugin

from delora.cli import conf_folder


def complete_folders() -> None:
    """Has Hydra's completion find `experiment=study/mrpc`, an option in a folder of a group."""
    of_hydra = CompletionPlugin._query_config_groups

    def query(self: CompletionPlugin, word: str, config_name: str | None, words: list[str]) -> tuple[list[str], bool]:
        found, exact = of_hydra(self, word, config_name, words)
        group, is_option, begun = word.lstrip("+").partition("=")
        if not is_option:
            return found, exact
        root = conf_folder() / group
        options = [path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml")]
        start = word.removesuffix(begun)
        return sorted({*found, *(f"{start}{option}" for option in options if option.startswith(begun))}), exact

    CompletionPlugin._query_config_groups = query  # type: ignore[method-assign]
