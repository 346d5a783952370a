//! How a command fails, and the exit code that says so: 1 internal or run-time failure, 2 bad input, 3 no feasible plan,
//! 130 interrupted.

use std::error::Error;
use std::fmt;

/// The outcome of a command that did not succeed.
#[derive(Debug)]
pub struct Failure {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

/// What went wrong, as scripts see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A bug, or the machine failed.
    Internal,
    /// The user can mend it.
    BadInput,
    /// An honest no: nothing fits.
    Infeasible,
    /// Ctrl-C; files written so far are valid.
    Interrupted,
}

impl Failure {
    /// The user's input is wrong; `error` says what, what is allowed and a way out.
    pub fn bad_input(error: impl fmt::Display) -> Failure {
        Failure { kind: Kind::BadInput, message: error.to_string(), hint: None }
    }

    /// No plan satisfies the constraints.
    pub fn infeasible(error: impl fmt::Display) -> Failure {
        Failure { kind: Kind::Infeasible, message: error.to_string(), hint: None }
    }

    /// Something failed while running.
    pub fn internal(error: impl fmt::Display) -> Failure {
        Failure { kind: Kind::Internal, message: error.to_string(), hint: None }
    }

    /// Stopped by the user.
    pub fn interrupted(message: impl fmt::Display) -> Failure {
        Failure { kind: Kind::Interrupted, message: message.to_string(), hint: None }
    }

    /// Says where the input came from.
    pub fn within(mut self, origin: &str) -> Failure {
        self.message = format!("{origin}: {}", self.message);
        self
    }

    /// Adds what to do next.
    pub fn hint(mut self, hint: impl fmt::Display) -> Failure {
        self.hint = Some(hint.to_string());
        self
    }

    /// The process exit code.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Internal => 1,
            Kind::BadInput => 2,
            Kind::Infeasible => 3,
            Kind::Interrupted => 130,
        }
    }

    /// What happened, in one line or a few.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What to do next, if there is something.
    pub fn advice(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}
