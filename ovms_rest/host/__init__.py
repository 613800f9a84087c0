"""What the machine and its kernel offer: cores, memory, priorities, throwaway processes."""
