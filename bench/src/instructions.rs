//! Counts the instructions of a piece of work, exactly, on any machine: a child process does it
//! one step at a time. No counter of the CPU is needed, which virtual machines often hide.

use std::io;

use anyhow::{Context, bail};

/// How many times more the work is done in the second of two runs, whose difference counts.
const TIMES: u64 = 4;
/// A child that takes more steps than this is killed.
const STEPS_MAX: u64 = 50_000_000;

/// User-space instructions of one call of `work`, which must not allocate, lock, or depend on the
/// number of the call: it runs in a forked child.
///
/// # Errors
/// The child cannot be traced, as where ptrace is forbidden.
pub(crate) fn count(work: impl Fn()) -> anyhow::Result<f64> {
    let once = steps(&work, 1)?;
    let often = steps(&work, 1 + TIMES)?;
    Ok((often - once) as f64 / TIMES as f64)
}

fn steps(work: &impl Fn(), times: u64) -> anyhow::Result<u64> {
    // SAFETY: the child calls nothing but `work`, ptrace, kill and _exit, none of which needs a
    // lock that another thread may have held when the process was forked.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()).context("fork"),
        0 => in_child(work, times),
        child => {
            let counted = step_through(child);
            if counted.is_err() {
                // SAFETY: the process is our own child, and has not been waited for.
                unsafe { libc::kill(child, libc::SIGKILL) };
                let _ = wait(child);
            }
            counted
        }
    }
}

fn in_child(work: &impl Fn(), times: u64) -> ! {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: system calls that take no memory of ours.
    unsafe {
        if libc::ptrace(libc::PTRACE_TRACEME, 0, none, none) != 0 {
            libc::_exit(1);
        }
        libc::kill(libc::getpid(), libc::SIGSTOP);
    }
    for _ in 0..times {
        work();
    }
    // SAFETY: ends the process at once, without running what belongs to the parent.
    unsafe { libc::_exit(0) }
}

fn wait(child: libc::pid_t) -> anyhow::Result<libc::c_int> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error).context("waitpid");
        }
    }
    Ok(status)
}

fn step_through(child: libc::pid_t) -> anyhow::Result<u64> {
    let status = wait(child)?;
    if !libc::WIFSTOPPED(status) {
        bail!("ptrace is forbidden here, so instructions cannot be counted");
    }
    let none = std::ptr::null_mut::<libc::c_void>();
    let mut steps = 0;
    loop {
        // SAFETY: a traced child of ours that has stopped; no memory is passed.
        if unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, none, none) } != 0 {
            return Err(io::Error::last_os_error()).context("ptrace");
        }
        let status = wait(child)?;
        if libc::WIFEXITED(status) {
            return Ok(steps);
        }
        if !libc::WIFSTOPPED(status) || libc::WSTOPSIG(status) != libc::SIGTRAP {
            bail!("the child that was counted got a signal: status {status:#x}");
        }
        steps += 1;
        if steps > STEPS_MAX {
            bail!("the work takes more than {STEPS_MAX} instructions");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn twice_the_work_takes_twice_the_instructions() {
        let work = |turns: u64| {
            move || {
                for turn in 0..turns {
                    black_box(turn);
                }
            }
        };
        let Ok(short) = count(work(100)) else {
            return;
        };
        let long = count(work(200)).expect("it has just worked");
        assert!(short >= 100.0, "{short}");
        let ratio = long / short;
        assert!((1.9..2.1).contains(&ratio), "{short} {long}");
    }
}
