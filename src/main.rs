use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything else: the guardian allocates nothing, starts no runtime and no thread that it does not need.
    if std::env::args_os().nth(1).is_some_and(|command| command == "guardian") {
        return pgvigil::cli::guardian(std::env::args_os().skip(2));
    }
    pgvigil::cli::main()
}
