package volume

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"csi-qcow2/qcow2"
)

// Params are the properties of a volume that its StorageClass chooses. They are
// stored in the record; the zero value is not valid, see DefaultParams.
type Params struct {
	ClusterSize   int64               `json:"clusterSize"` // bytes
	LazyRefcounts bool                `json:"lazyRefcounts,omitempty"`
	Preallocation qcow2.Preallocation `json:"preallocation"`
	DirectIO      bool                `json:"directIO,omitempty"` // bypass the host's page cache
	Discard       bool                `json:"discard"`            // give discarded space back to the host
	CloneMode     CloneMode           `json:"cloneMode,omitempty"`
}

// A CloneMode says how a volume is made from a source.
type CloneMode string

// The values of CloneMode.
const (
	// CloneLinked: the clone reads from its source what it has not overwritten.
	CloneLinked CloneMode = ""
	// CloneCopy: the same at first, until everything was copied in the background.
	CloneCopy CloneMode = "copy"
	// CloneReflink: the clone shares blocks with its source through the host's
	// file system, and depends on nothing.
	CloneReflink CloneMode = "reflink"
	// CloneAuto: CloneReflink where it is possible, else CloneLinked.
	CloneAuto CloneMode = "auto"
)

// DefaultParams returns the parameters of an empty StorageClass.
func DefaultParams() Params {
	return Params{ClusterSize: 64 << 10, Preallocation: qcow2.PreallocationOff, Discard: true}
}

// The bounds of clusterSize. QEMU allows 512 bytes; below 4 KiB the metadata
// outweighs the data and direct I/O is impossible.
const (
	minClusterSize = 4 << 10
	maxClusterSize = 2 << 20
)

// paramParsers has one function per parameter name; each sets its field of p.
var paramParsers = map[string]func(p *Params, value string) error{
	"clusterSize": func(p *Params, v string) (err error) {
		p.ClusterSize, err = parseSize(v)
		if err == nil && (p.ClusterSize < minClusterSize || p.ClusterSize > maxClusterSize || p.ClusterSize&(p.ClusterSize-1) != 0) {
			err = fmt.Errorf("want a power of two from 4Ki to 2Mi")
		}
		return err
	},
	"lazyRefcounts": func(p *Params, v string) (err error) { p.LazyRefcounts, err = parseBool(v); return err },
	"directIO":      func(p *Params, v string) (err error) { p.DirectIO, err = parseBool(v); return err },
	"discard":       func(p *Params, v string) (err error) { p.Discard, err = parseBool(v); return err },
	"preallocation": func(p *Params, v string) error {
		p.Preallocation = qcow2.Preallocation(v)
		if !slices.Contains(preallocations, p.Preallocation) {
			return fmt.Errorf("want one of %v", preallocations)
		}
		return nil
	},
	"cloneMode": func(p *Params, v string) error {
		switch p.CloneMode = CloneMode(v); p.CloneMode {
		case "linked":
			p.CloneMode = CloneLinked
		case CloneCopy, CloneReflink, CloneAuto:
		default:
			return fmt.Errorf("want linked, copy, reflink or auto")
		}
		return nil
	},
	"extendedL2": func(_ *Params, v string) error {
		on, err := parseBool(v)
		if err == nil && on {
			err = fmt.Errorf("volumes with subclusters are not supported")
		}
		return err
	},
}

var preallocations = []qcow2.Preallocation{
	qcow2.PreallocationOff, qcow2.PreallocationMetadata, qcow2.PreallocationFalloc, qcow2.PreallocationFull,
}

// reserved returns how much space a volume of size bytes takes at once, about, in bytes.
func (p Params) reserved(size int64) int64 {
	const tables = 8 + 2 // bytes for each cluster: an L2 entry and a refcount
	switch p.Preallocation {
	case qcow2.PreallocationMetadata:
		return size / p.ClusterSize * tables
	case qcow2.PreallocationFalloc, qcow2.PreallocationFull:
		return size + size/p.ClusterSize*tables
	}
	return 0
}

// ParseParams parses StorageClass parameters. Unknown names, names that differ
// in case, and malformed values are refused with ErrInvalid.
func ParseParams(m map[string]string) (Params, error) {
	p := DefaultParams()
	for name, value := range m {
		parse := paramParsers[name]
		if parse == nil {
			return Params{}, fmt.Errorf("%w: unknown parameter %q; known are %s", ErrInvalid, name, strings.Join(paramNames(), ", "))
		}
		if err := parse(&p, value); err != nil {
			return Params{}, fmt.Errorf("%w: parameter %s=%q: %v", ErrInvalid, name, value, err)
		}
	}
	return p, nil
}

func paramNames() []string {
	names := make([]string, 0, len(paramParsers))
	for name := range paramParsers {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func parseBool(v string) (bool, error) {
	switch v {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf(`want "true" or "false"`)
}

// parseSize parses bytes in decimal, or with the suffix Ki or Mi.
func parseSize(v string) (int64, error) {
	digits, unit := v, int64(1)
	for suffix, n := range map[string]int64{"Ki": 1 << 10, "Mi": 1 << 20} {
		if d, ok := strings.CutSuffix(v, suffix); ok {
			digits, unit = d, n
		}
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("want a number of bytes, or of Ki or Mi")
	}
	return int64(n) * unit, nil
}
