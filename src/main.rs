use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    // Before anything else is set up: the guardian has to stay small.
    if args.next().is_some_and(|command| command == "guardian") {
        return pgvigil::guardian::main_from_args(args);
    }
    ExitCode::SUCCESS
}
