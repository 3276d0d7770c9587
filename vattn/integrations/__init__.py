"""Adapters: what other libraries call, through the hooks that they have for it.

Each module imports the library that it is for, and nothing else in vattn imports these modules unless a model of that
library is given: :mod:`vattn.integrations.transformers`, :mod:`vattn.integrations.timm`,
:mod:`vattn.integrations.diffusers`.
"""
