"""Running models over token blocks, whole or one decoder layer at a time.

``forward`` runs a whole model. The rest runs its layers one by one over stored hidden states, for work between two
layers and for models larger than memory:

    source = LoadedLayers(model, geometry)              # or LazyLayers(checkpoint): one layer in memory at a time
    stream = LayerStream(source, blocks, batch_size=4)
    with HiddenStates() as hidden:                      # or HiddenStates(folder): on disk
        stream_through(stream, hidden, on_layer)        # on_layer sees, taps and may change each layer before it runs
        for batch, logits in stream.logits(hidden):
            ...

The pieces fit together in other ways too; ``layers`` shows a dense and a pruned stream side by side.
"""
