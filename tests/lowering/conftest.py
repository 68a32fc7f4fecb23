"""Prints what ahead-of-time compilation took, also where tests run in several processes."""


def pytest_terminal_summary(terminalreporter):
    rows = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "compile":
                program, column, seconds = value
                rows.setdefault(program, {})[column] = seconds
    if not rows:
        return
    columns = sorted({c for row in rows.values() for c in row}, key=str.lower)
    terminalreporter.section("CPU seconds of compilation")
    terminalreporter.write_line("| program | " + " | ".join(columns) + " |")
    terminalreporter.write_line("|---|" + "---|" * len(columns))
    for program, row in rows.items():
        cells = (f"{row[c]:.1f}" if c in row else "" for c in columns)
        terminalreporter.write_line(f"| `{program}` | " + " | ".join(cells) + " |")
