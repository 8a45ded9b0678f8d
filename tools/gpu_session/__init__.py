"""All that a GPU can tell of this project, where one is at hand for minutes, without a network, git or make."""
