"""The real corpora, one file each: an unpacked package in, samples with their splits out."""
