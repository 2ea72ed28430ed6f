package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"csi-qcow2/volume"
)

// A reportPrinter prints reports for people.
type reportPrinter func(w io.Writer, reports []volume.Report) error

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// newTable returns a writer that aligns columns, which tabs separate.
func newTable(w io.Writer, columns ...string) *tabwriter.Writer {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.Join(columns, "\t"))
	return t
}

// printVolumes prints a line per volume.
func printVolumes(w io.Writer, reports []volume.Report) error {
	t := newTable(w, "NAME", "ID", "SIZE", "ON HOST", "SNAPSHOTS", "STATE", "POOL")
	for _, r := range reports {
		for _, v := range r.Volumes {
			snapshots := 0
			for _, s := range v.Snapshots {
				if !s.Deleted && !s.Hidden {
					snapshots++
				}
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", orDash(v.Name), v.ID, humanSize(v.Size), humanSize(v.HostBytes),
				snapshots, volumeState(v), r.Pool)
		}
	}
	return t.Flush()
}

// volumeState says in a few words what is special about a volume.
func volumeState(v volume.VolumeReport) string {
	var words []string
	add := func(on bool, format string, args ...any) {
		if on {
			words = append(words, fmt.Sprintf(format, args...))
		}
	}
	add(v.Attached, "attached")
	add(v.Reads != "" && !v.Copy.Pending, "linked")
	add(v.Copy.Pending, "copying, %d %% done", percent(v.Copy.Done, v.Size))
	add(v.Deleted, "deleted, needed by others")
	add(v.Problem != "", "%s", v.Problem)
	return orDash(strings.Join(words, "; "))
}

func snapshotState(s volume.SnapshotReport) string {
	switch {
	case s.Hidden:
		return "of a clone"
	case s.Deleted && len(s.Clones) > 0:
		return "deleted, needed by clones"
	case s.Deleted:
		return "being deleted"
	case s.Group != "":
		return "of " + s.Group
	}
	return ""
}

func percent(part, whole int64) int64 {
	if whole == 0 {
		return 100
	}
	return int64(float64(part) / float64(whole) * 100)
}

func orDash(s string) string { return cmp.Or(s, "-") }

// printTree prints volumes below the snapshots that they read from.
func printTree(w io.Writer, reports []volume.Report) error {
	for _, r := range reports {
		byID := make(map[string]volume.VolumeReport)
		children := make(map[string]bool)
		for _, v := range r.Volumes {
			byID[v.ID] = v
			for _, s := range v.Snapshots {
				for _, c := range s.Clones {
					children[c] = true
				}
			}
		}
		roots := slices.DeleteFunc(slices.Clone(r.Volumes), func(v volume.VolumeReport) bool { return children[v.ID] })
		if _, err := fmt.Fprintln(w, r.Pool); err != nil {
			return err
		}
		for i, v := range roots {
			if err := printBranch(w, "", i == len(roots)-1, byID, v); err != nil {
				return err
			}
		}
	}
	return nil
}

// printBranch prints v and what is below it.
func printBranch(w io.Writer, indent string, last bool, byID map[string]volume.VolumeReport, v volume.VolumeReport) error {
	next, err := printTwig(w, indent, last, cmp.Or(v.Name, v.ID), v.ID, humanSize(v.Size), volumeState(v))
	if err != nil {
		return err
	}
	for i, s := range v.Snapshots {
		below, err := printTwig(w, next, i == len(v.Snapshots)-1, "@ "+cmp.Or(s.Name, s.ID), s.ID, humanSize(s.Size), snapshotState(s))
		if err != nil {
			return err
		}
		for j, c := range s.Clones {
			clone, known := byID[c]
			if !known {
				continue // gone since
			}
			if err := printBranch(w, below, j == len(s.Clones)-1, byID, clone); err != nil {
				return err
			}
		}
	}
	return nil
}

// printTwig prints one line of a tree and returns the indent of what is below it.
func printTwig(w io.Writer, indent string, last bool, name string, more ...string) (string, error) {
	fork, next := "├─ ", "│  "
	if last {
		fork, next = "└─ ", "   "
	}
	more = slices.DeleteFunc(more, func(s string) bool { return s == "" || s == "-" || s == name })
	_, err := fmt.Fprintf(w, "%s%s%s (%s)\n", indent, fork, name, strings.Join(more, ", "))
	return indent + next, err
}

// printUsage prints who holds the space of each image.
func printUsage(w io.Writer, reports []volume.Report) error {
	t := newTable(w, "NAME", "ID", "ALONE", "SHARED", "ON HOST", "STATE")
	for _, r := range reports {
		for _, v := range r.Volumes {
			if v.Usage == nil {
				fmt.Fprintf(t, "%s\t%s\t-\t-\t%s\t%s\n", orDash(v.Name), v.ID, humanSize(v.HostBytes), volumeState(v))
				continue
			}
			u := v.Usage
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", orDash(v.Name), v.ID,
				humanSize(u.Active.Unique), humanSize(u.Active.Shared), humanSize(v.HostBytes), volumeState(v))
			for _, s := range v.Snapshots {
				alone, shared := "-", "-"
				if s.Usage != nil {
					alone, shared = humanSize(s.Usage.Unique), humanSize(s.Usage.Shared)
				}
				fmt.Fprintf(t, "  @ %s\t%s\t%s\t%s\t\t%s\n", orDash(s.Name), s.ID, alone, shared, snapshotState(s))
			}
			fmt.Fprintf(t, "  metadata\t\t%s\t\t\t\n", humanSize(u.Metadata))
		}
	}
	return t.Flush()
}
