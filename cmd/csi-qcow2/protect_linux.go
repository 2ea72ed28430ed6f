package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"csi-qcow2/driver"
)

// The kernel frees memory by writing to our devices, and we need memory to take that. So the process
// must never wait for the kernel to do the one before it has done the other:
//
//   - Every thread is an I/O flusher (PR_SET_IO_FLUSHER): the kernel does not wait for I/O when such a thread
//     allocates memory, nor slow it down for dirty pages of others. The mark is of a
//     thread, inherited by those that it starts, and kept by exec.
//   - What the process has in memory stays there (mlockall).
//   - The heap is bounded (the memory limit of the Go runtime).
//
// All of it needs capabilities that some containers lack. Then the process runs, and says so.

// flusherEnv says that the process was started anew to mark its threads.
const flusherEnv = "CSI_QCOW2_IO_FLUSHER"

// markThreads makes every thread an I/O flusher: it marks one and starts the program anew from that
// one. It is for the beginning of main, and returns when there is nothing to do, or no way; see
// threadProblem.
func markThreads() {
	if on, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0); on == 1 || err != nil || os.Getenv(flusherEnv) != "" {
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return
	}
	path, err := os.Executable()
	if err != nil {
		path = "/proc/self/exe"
	}
	// It returns only when it fails: then this thread is marked, and others are not.
	_ = syscall.Exec(path, os.Args, append(os.Environ(), flusherEnv+"=1"))
}

// Flags of a task in /proc/PID/task/TID/stat that PR_SET_IO_FLUSHER sets: do no I/O to get memory,
// and throttle only by the disk that is written to. Spec: Linux include/linux/sched.h.
const flusherFlags = 0x00080000 | 0x00100000

// threadProblem looks at every thread of the process. It returns why memory pressure may block one,
// or nil.
func threadProblem() error {
	stats, err := filepath.Glob("/proc/self/task/*/stat")
	if err != nil {
		return err
	}
	unmarked := 0
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		flags, err := taskFlags(string(b))
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if flags&flusherFlags != flusherFlags {
			unmarked++
		}
	}
	if unmarked > 0 || len(stats) == 0 {
		return fmt.Errorf("%d of %d threads are no I/O flushers: when memory is short the node may hang; grant CAP_SYS_RESOURCE (Linux 5.6 or later)", unmarked, len(stats))
	}
	return nil
}

// taskFlags returns the field "flags" of a task's stat. The name before it may hold anything.
func taskFlags(stat string) (uint64, error) {
	const after = 6 // fields between the name and the flags
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) <= after {
		return 0, errors.New("no flags")
	}
	return strconv.ParseUint(fields[after], 10, 64)
}

// lockMemory keeps in memory what the process touches from now on.
func lockMemory() error {
	// Without the capability later allocations would count against a limit, and the runtime
	// dies of one that is refused.
	if !driver.Capable(unix.CAP_IPC_LOCK) {
		return errors.New("memory is not locked: when it is short the node may hang; grant CAP_IPC_LOCK")
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("memory is not locked: %w", err)
	}
	return nil
}

// protectMemory prepares the process for serving the kernel that it runs on, and returns what it
// could not do. reserved is memory that does not count as heap, in bytes.
func protectMemory(reserved int64) (problems []string) {
	for _, err := range []error{lockMemory(), threadProblem()} {
		if err != nil {
			klog.ErrorS(err, "the process is not protected against memory pressure")
			problems = append(problems, err.Error())
		}
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		limit := heapLimit(memoryMax(), reserved)
		debug.SetMemoryLimit(limit)
		klog.V(2).InfoS("set the memory limit of the heap", "bytes", limit)
	}
	return problems
}

// Bounds of the heap's memory limit, in bytes. It is a soft limit: the garbage collector works harder.
const (
	minHeapLimit = 64 << 20
	maxHeapLimit = 2 << 30
)

// heapLimit returns how large the heap shall become in a process that may use most bytes.
func heapLimit(most, reserved int64) int64 {
	return max(minHeapLimit, min(maxHeapLimit, most/8*7-reserved))
}

// memoryMax returns how much memory the process may use, in bytes: the limit of its control group, else a
// quarter of the machine's.
func memoryMax() int64 {
	if groups, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		if n, limited := groupMax("/sys/fs/cgroup", string(groups)); limited {
			return n
		}
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit) / 4
}

// groupMax returns the least limit of memory of a process's control groups and those around them. root is
// where they are mounted, groups what /proc/PID/cgroup says. A privileged container sees the host's groups,
// its own far below root; another container sees its own as root.
func groupMax(root, groups string) (least int64, limited bool) {
	for line := range strings.Lines(groups) {
		// ID:CONTROLLERS:PATH, of version 2 0::PATH
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) < 3 {
			continue
		}
		dir, file := root, "memory.max"
		if fields[1] != "" {
			if !slices.Contains(strings.Split(fields[1], ","), "memory") {
				continue
			}
			dir, file = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		}
		for path := filepath.Clean("/" + fields[2]); ; path = filepath.Dir(path) {
			if b, err := os.ReadFile(filepath.Join(dir, path, file)); err == nil {
				n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // or "max"
				if err == nil && n < 1<<50 && (!limited || n < least) {
					least, limited = n, true
				}
			}
			if path == "/" {
				break
			}
		}
	}
	return least, limited
}
