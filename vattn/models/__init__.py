"""Reference models, each a consumer of the public operators: ``from vattn.models import laps``."""
