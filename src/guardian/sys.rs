//! The system calls that std and nix do not offer safely. The only file of the guardian with `unsafe` in it.

#![allow(unsafe_code, reason = "raw system calls; every block says why it is sound")]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

pub enum Fork {
    Child,
    Parent(i32),
}

/// Forks the only thread of this process.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the guardian's processes have one thread each, so the child may do everything that its parent might:
    // no lock can be held by a thread that the child does not have.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => Ok(Fork::Child),
        nix::unistd::ForkResult::Parent { child } => Ok(Fork::Parent(child.as_raw())),
    }
}

pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, gives a new descriptor (close-on-exec) that nobody else owns, or -1.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as RawFd)) }
    }
}

/// Signals exactly the process that the descriptor was opened for, never one that has its number now.
pub fn pidfd_send_signal(process: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    // SAFETY: integers and a null pointer, which means "as kill(2) would fill it".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// SCHED_FIFO for this process, not for what it forks: PostgreSQL with real-time priority would starve the machine.
pub fn set_real_time(priority: u8) -> io::Result<()> {
    // SAFETY: the structure outlives the call; 0 is this thread, the only one.
    let result = unsafe {
        let mut parameters: libc::sched_param = std::mem::zeroed();
        parameters.sched_priority = libc::c_int::from(priority);
        libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &parameters)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets go of program text that only starting needed (dynamic linking, argument parsing): it would stay locked for good.
/// What runs from now on comes back from the page cache, and what the kill needs is rehearsed after this.
pub fn forget_startup_text(maps: &str) {
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some("r-xp"), path) = (fields.next(), fields.next(), fields.nth(3)) else { continue };
        let bounds = range.split_once('-').map(|(a, b)| (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16)));
        let (Some((Ok(start), Ok(end))), Some(path)) = (bounds, path) else { continue };
        if !path.starts_with('/') {
            continue;
        }
        // SAFETY: a private mapping of a file that was never writable holds nothing that is not in the file; its pages are
        // read again when they are next executed, this function's included.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
        }
    }
}

/// Keeps every page that is or comes in memory there. ONFAULT: without it the whole program would become resident.
pub fn lock_memory() -> io::Result<()> {
    // SAFETY: takes flags only.
    let result = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT as libc::c_int) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes every descriptor from 3 up. Only for the first line of a program: what is open there was inherited by accident.
pub fn close_inherited() {
    // SAFETY: called before this process opened anything, so no object in it owns one of the descriptors.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0);
    }
}

/// Gives every signal its default action again: std ignores SIGPIPE, and ignored signals survive exec.
pub fn reset_signals() {
    for number in Signal::iterator() {
        if matches!(number, Signal::SIGKILL | Signal::SIGSTOP) {
            continue;
        }
        // SAFETY: SIG_DFL installs no code.
        let _ = unsafe { signal(number, SigHandler::SigDfl) };
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Code(i32),
    Signal(i32),
}

/// Collects one child that has ended. Not nix's waitpid: that loses a child that died of a real-time signal.
pub fn reap() -> Option<(i32, Ended)> {
    let mut status = 0;
    // SAFETY: the kernel writes one integer.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    if pid <= 0 {
        return None;
    }
    if libc::WIFEXITED(status) {
        Some((pid, Ended::Code(libc::WEXITSTATUS(status))))
    } else {
        Some((pid, Ended::Signal(libc::WTERMSIG(status))))
    }
}

/// Reads directory entries as the kernel writes them (`struct linux_dirent64`), without the allocations of readdir.
pub fn read_directory(directory: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes into the buffer.
    let read = unsafe {
        libc::syscall(libc::SYS_getdents64, directory.as_raw_fd(), buffer.as_mut_ptr(), buffer.len() as libc::c_uint)
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// How many 64-bit cells a shared page has.
pub const CELLS: usize = 512;
const PAGE_BYTES: usize = CELLS * 8;

/// A page of memory shared with other processes, as atomic cells: they can hold surprises, but never a data race.
pub struct SharedCells {
    cells: &'static [AtomicU64; CELLS],
}

impl SharedCells {
    /// Maps a memfd of one page. The caller has checked that the file cannot shrink (F_SEAL_SHRINK).
    pub fn map(file: &impl AsFd) -> io::Result<SharedCells> {
        let length = NonZeroUsize::new(PAGE_BYTES).expect("a page is not empty");
        // SAFETY: a new mapping at an address of the kernel's choice; it lives until Drop. Cells are atomics, so writes
        // by other processes are not data races; the seal keeps the page from vanishing (SIGBUS).
        let address =
            unsafe { mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, 0) }?;
        // SAFETY: page-aligned, PAGE_BYTES long, valid until Drop unmaps it; the reference is not given out for longer
        // than `&self`.
        let cells = unsafe { &*address.as_ptr().cast::<[AtomicU64; CELLS]>() };
        Ok(SharedCells { cells })
    }

    pub fn cell(&self, index: usize) -> &AtomicU64 {
        &self.cells[index]
    }
}

impl Drop for SharedCells {
    fn drop(&mut self) {
        let address = std::ptr::NonNull::from(self.cells).cast();
        // SAFETY: mapped by `map` with this length, and no reference outlives `self`.
        let _ = unsafe { munmap(address, PAGE_BYTES) };
    }
}

/// Receives a packet and the descriptor that may come with it.
pub fn receive_with_descriptor(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!(RawFd);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut received = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            for descriptor in descriptors {
                // SAFETY: the kernel just made it for this process, and nobody else knows it. A second one is closed by
                // replacing the first.
                received = Some(unsafe { OwnedFd::from_raw_fd(descriptor) });
            }
        }
    }
    Ok((message.bytes, received))
}
