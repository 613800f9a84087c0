"""Worker tables, for the tests of the table and of what reads it."""

from ovms_rest.shared_memory.table import Row, WorkerTable


def make_rows(*workers: tuple[int, int], cores: int = 9, size: int = 8) -> tuple[WorkerTable, list[Row]]:
    """Make a table with a row for every (connections, idle since); the process ids count from 100."""
    table = WorkerTable(size, cores)
    rows = []
    for number, (connections, idle) in enumerate(workers):
        row = table.take()
        row.set_pid(100 + number)
        row.set_connections(connections)
        row.set_idle(idle)
        rows.append(row)
    return table, rows
