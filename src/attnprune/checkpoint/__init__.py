"""Models as directories of ordinary files: safetensors and JSON, nothing that runs.

``folder`` opens and replaces files, ``tensors`` reads and writes safetensors one tensor at a time, ``record`` says what
shape every attention has, ``manifest`` is the JSON beside the weights, ``skeleton`` gives models without weights.
``save``, ``load``, ``stock`` and ``stream`` are what users call.
"""
