package demo

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// processes returns the processes of the agent's group: itself and whatever
// it started. Zombies hold nothing and are not counted. The number of a group that
// has ended may be another's by now: of a kept stage, after a reboot, it usually is.
func (s stage) processes() ([]leftover, error) {
	text, err := os.ReadFile(s.pidFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	group := strings.TrimSpace(string(text))
	pid, err := strconv.Atoi(group)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", s.pidFile(), err)
	}
	if ours, err := s.isGroup(pid); !ours {
		return nil, err
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var found []leftover
	for _, file := range stats {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // ended since the listing
		}
		name, fields := parseStat(string(text))
		if len(fields) > 2 && fields[0] != "Z" && fields[0] != "X" && fields[2] == group {
			found = append(found, leftover{"process", filepath.Base(filepath.Dir(file)), name})
		}
	}
	return found, nil
}

// isGroup reports whether the group pid is that of the agent. When the process of that
// number is gone, but not the machine's boot, what is left of the group is the agent's.
func (s stage) isGroup(pid int) (bool, error) {
	text, err := os.ReadFile(s.birthFile())
	if err != nil {
		return false, nil // nobody knows whose it is
	}
	wasBoot, wasBegun, _ := strings.Cut(string(text), " ")
	boot, begun, err := birth(pid)
	return err == nil && boot == wasBoot && (begun == "" || begun == wasBegun), err
}

// birth tells the process pid from others that had or will have its number: by the boot
// of the machine, and by when it began since then. begun is "" when there is no process.
func birth(pid int) (boot, begun string, err error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", err
	}
	boot = strings.TrimSpace(string(text))
	if text, err = os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil {
		return boot, "", nil
	}
	if _, fields := parseStat(string(text)); len(fields) > 19 {
		begun = fields[19] // starttime, in ticks
	}
	return boot, begun, nil
}

// parseStat returns the name of a process and the fields behind it: pid (name) state
// ppid pgrp …; the name may hold anything.
func parseStat(stat string) (name string, fields []string) {
	begin, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if begin < 0 || end < begin {
		return "", nil
	}
	return stat[begin+1 : end], strings.Fields(stat[end+1:])
}
