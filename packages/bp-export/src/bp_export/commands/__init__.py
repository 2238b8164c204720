"""The commands of ``bp-export``: each module has ``build_parser`` and ``run``, and imports its work when it runs."""
