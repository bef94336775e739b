"""One reading of an update: as a gradient, the head, labels, the imitated client, defences, first layer, floors."""
