package demo

import (
	"fmt"
	"os"
	"path/filepath"
)

// A stage is the directory in which everything of one run lies:
//
//	DIR/csi-qcow2-demo    marker: the directory is ours
//	DIR/pool/             the pool
//	DIR/run/              the agent's run directory
//	DIR/csi.sock          its CSI socket
//	DIR/node.pid          its process
//	DIR/node.birth        which of all processes of that number it is
//	DIR/node.log          what it said
//	DIR/staging/ID/       staging target path of volume ID
//	DIR/pods/ID/volume    its target path
//	DIR/qemu/             what QEMU's tools made, and its mount point
type stage string

const marker = "csi-qcow2-demo"

func (s stage) path(elem ...string) string {
	return filepath.Join(append([]string{string(s)}, elem...)...)
}

func (s stage) pool() string             { return s.path("pool") }
func (s stage) run() string              { return s.path("run") }
func (s stage) socket() string           { return s.path("csi.sock") }
func (s stage) pidFile() string          { return s.path("node.pid") }
func (s stage) birthFile() string        { return s.path("node.birth") }
func (s stage) log() string              { return s.path("node.log") }
func (s stage) staging(id string) string { return s.path("staging", id) }
func (s stage) target(id string) string  { return s.path("pods", id, "volume") }
func (s stage) disk(id string) string    { return s.path("pool", "volumes", id, "disk.qcow2") }

// rel returns a path below the stage as it reads best.
func (s stage) rel(path string) string {
	if r, err := filepath.Rel(string(s), path); err == nil && filepath.IsLocal(r) {
		return r
	}
	return path
}

// buildStage makes the directories of a stage: in dir, which must be missing
// or empty, or with dir "" in a new temporary directory.
func buildStage(dir string) (stage, error) {
	var err error
	if dir == "" {
		if dir, err = os.MkdirTemp("", "csi-qcow2-demo-"); err != nil {
			return "", err
		}
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	// Mounts are listed by their real path; compare with that.
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	if len(entries) > 0 {
		return "", fmt.Errorf("directory %q is not empty; name a new one", dir)
	}
	s := stage(dir)
	for _, sub := range []string{"pool", "run", "staging", "pods", "qemu"} {
		if err := os.Mkdir(s.path(sub), 0o700); err != nil {
			return "", err
		}
	}
	return s, os.WriteFile(s.path(marker), nil, 0o600)
}

// openStage finds the stage that an earlier run kept in dir.
func openStage(dir string) (stage, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", err
	}
	s := stage(dir)
	if _, err := os.Stat(s.path(marker)); err != nil {
		return "", fmt.Errorf("directory %q holds no demo: %w", dir, err)
	}
	return s, nil
}
