"""What the commands of `dydiff data` do: look at datasets, judge and convert them, find their simulator."""
