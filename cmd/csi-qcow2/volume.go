package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"csi-qcow2/driver"
	"csi-qcow2/volume"
)

// volumeFlags are the flags of all `csi-qcow2 volume` commands.
type volumeFlags struct {
	endpoint string
	pool     string
	output   string
}

func newVolumeCommand() *cobra.Command {
	f := volumeFlags{endpoint: defaultNodeFlags().endpoint, pool: defaultPoolDir, output: outputTable}
	cmd := &cobra.Command{
		Use:   "volume",
		Short: "Look at the volumes of this node; revert one to a snapshot",
		Long: `Look at the volumes of this node: which there are, what they were made from, and
who holds whose space. Revert one to a snapshot.

The node agent at --endpoint is asked. Where none serves, the pool at --pool is
opened instead, for as long as the command runs; volumes that an agent has left
unclosed are not touched then.

A volume or snapshot is named by its ID or by its name.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("unknown command %q; see csi-qcow2 volume --help", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	flags := cmd.PersistentFlags()
	flags.StringVar(&f.endpoint, "endpoint", f.endpoint, "socket of the node agent")
	flags.StringVar(&f.pool, "pool", f.pool, "directory of the pool to open where no agent serves")
	flags.StringVarP(&f.output, "output", "o", f.output, "table or json")
	cmd.AddCommand(
		f.lookCommand("ls", "List volumes", false, printVolumes),
		f.lookCommand("tree", "Show which volume was made from which snapshot, and reads from it", false, printTree),
		f.lookCommand("du", "Show who holds whose space", true, printUsage),
		f.revertCommand(),
	)
	return cmd
}

// The values of --output.
const (
	outputTable = "table"
	outputJSON  = "json"
)

func (f *volumeFlags) validate() error {
	if f.output != outputTable && f.output != outputJSON {
		return usageErrorf("--output is %q; want table or json", f.output)
	}
	if !filepath.IsAbs(f.pool) {
		return usageErrorf("--pool %q: want an absolute path", f.pool)
	}
	if _, err := driver.ParseEndpoint(f.endpoint); err != nil {
		return usageErrorf("--endpoint: %v", err)
	}
	return nil
}

// lookCommand returns a command that prints a report.
func (f *volumeFlags) lookCommand(name, short string, usage bool, print reportPrinter) *cobra.Command {
	return &cobra.Command{
		Use:   name,
		Short: short,
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.validate(); err != nil {
				return err
			}
			o, err := f.open(cmd.Context())
			if err != nil {
				return err
			}
			reports, err := o.Report(cmd.Context(), usage)
			if err := errors.Join(err, o.Close()); err != nil {
				return err
			}
			if f.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), reports)
			}
			return print(cmd.OutOrStdout(), reports)
		},
	}
}

func (f *volumeFlags) revertCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "revert VOLUME SNAPSHOT",
		Short: "Bring a volume back to a snapshot",
		Long: `Make the content of a volume what it was when the snapshot was taken. No pod may
use the volume. All snapshots stay, later ones too, so that it can be brought
forward again if there is a snapshot of today. The size stays as well.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageErrorf("revert takes a volume and a snapshot, got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.validate(); err != nil {
				return err
			}
			o, err := f.open(cmd.Context())
			if err != nil {
				return err
			}
			err = revert(cmd.Context(), o, args[0], args[1])
			if err := errors.Join(err, o.Close()); err != nil {
				return err
			}
			if f.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), map[string]string{"volume": args[0], "snapshot": args[1]})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is what it was at snapshot %s\n", args[0], args[1])
			return nil
		},
	}
}

// An operator answers for the volumes of a node: a node agent, or a pool that
// no agent serves.
type operator interface {
	Report(ctx context.Context, usage bool) ([]volume.Report, error)
	Revert(ctx context.Context, id, snapshot string) error
	Close() error
}

// open returns the node agent at the endpoint, or else the pool.
func (f *volumeFlags) open(ctx context.Context) (operator, error) {
	agent, err := driver.DialOperator(ctx, f.endpoint)
	if err == nil {
		return agent, nil
	}
	if !errors.Is(err, driver.ErrNoAgent) {
		return nil, err
	}
	pool, poolErr := volume.Open(ctx, f.pool, volume.Options{ClosedOnly: true})
	if poolErr != nil {
		return nil, fmt.Errorf("%w; %w; give the --endpoint of the agent, or the --pool", err, poolErr)
	}
	return lonePool{pool}, nil
}

// A lonePool is a pool that no agent serves.
type lonePool struct{ *volume.Pool }

// Report implements operator.
func (p lonePool) Report(ctx context.Context, usage bool) ([]volume.Report, error) {
	r, err := p.Pool.Report(ctx, usage)
	return []volume.Report{r}, err
}

// Revert implements operator.
func (p lonePool) Revert(ctx context.Context, id, snapshot string) error {
	_, err := p.Pool.Revert(ctx, id, snapshot)
	return err
}

// revert reverts the volume called name to its snapshot called snapshot; both may be IDs.
func revert(ctx context.Context, o operator, name, snapshot string) error {
	reports, err := o.Report(ctx, false)
	if err != nil {
		return err
	}
	v, err := findVolume(reports, name)
	if err != nil {
		return err
	}
	for _, s := range v.Snapshots {
		if !s.Deleted && !s.Hidden && (s.ID == snapshot || s.Name == snapshot) {
			return o.Revert(ctx, v.ID, s.ID)
		}
	}
	return fmt.Errorf("volume %s has no snapshot %q; csi-qcow2 volume tree lists them", name, snapshot)
}

// findVolume returns the volume that users see with this ID or name.
func findVolume(reports []volume.Report, name string) (*volume.VolumeReport, error) {
	var found []*volume.VolumeReport
	for i := range reports {
		for j := range reports[i].Volumes {
			if v := &reports[i].Volumes[j]; !v.Deleted && (v.ID == name || v.Name == name) {
				found = append(found, v)
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no volume %q; csi-qcow2 volume ls lists them", name)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("%d volumes are called %q; give an ID", len(found), name)
}
