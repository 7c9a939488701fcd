use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    // Before anything else: the guardian has to stay small; it starts no runtime and no thread that it does not need.
    let command = args.next();
    if command.as_ref().is_some_and(|command| command == "guardian") {
        return pgvigil::guardian::main_from_args(args);
    }
    if command.is_some_and(|command| command == "storage-probe") {
        return pgvigil::storage::main_from_args(args);
    }
    pgvigil::cli::main()
}
