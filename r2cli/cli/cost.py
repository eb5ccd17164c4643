"""`r2 cost`: what each layer costs at each width, as a table for `r2 ptq --cost`."""

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config import values
from r2cli.config.groups import Inputs
from r2cli.config.inspection import CostConfig, CostOutput


@command
def cost(given: Inputs, config: CostConfig, written: CostOutput) -> Report:
    """Measure what each layer costs at each width: a table for `r2 ptq --cost`."""
    source = gates.source(given)
    gates.require_output(written.output, ".csv", source=source)
    gates.require_free([written.output], overwrite=written.overwrite)
    widths = values.widths(config.widths)
    if written.dry_run:
        console.tell([f"would measure {source} at {', '.join(widths)} -> {written.output}"], as_json=written.json)
        return {"command": "cost"}

    from r2cli.api import inputs
    from r2cli.deploy import layer_cost
    from r2cli.ptq import cost_table
    from r2cli.storage.atomic import write_atomically

    made, _ = inputs.load(given, needed=False, tell=console.note)
    console.note(f"measuring the layers of {source} at {', '.join(widths)} for {config.target}")
    rows = layer_cost.measured(made, config.target, widths)
    write_atomically(written.output, cost_table.written(rows).encode())
    known = list(dict.fromkeys(width for _, width, _ in rows))
    by_layer = {name: [cost for own, _, cost in rows if own == name] for name in dict.fromkeys(row[0] for row in rows)}
    cells = [(name, *(f"{cost:,.4g}" for cost in own)) for name, own in by_layer.items()]
    total = {width: sum(cost for _, own, cost in rows if own == width) for width in known}
    cells.append(("all", *(f"{cost:,.4g}" for cost in total.values())))
    table = console.table(("layer", *map(str, known)), cells)
    budget = f"{min(total.values()) + 0.5 * (max(total.values()) - min(total.values())):.4g}"
    following = console.next_step("r2", "ptq", source, "--cost", written.output, "--budget", budget)
    console.tell([table, f"wrote {written.output}", following], as_json=written.json)
    return {"command": "cost", "output": written.output, "total": {str(width): each for width, each in total.items()}}
