package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log"
	"net"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registrationDir is where a pod of the driver sees the kubelet's directory of plugins.
const registrationDir = "/registration"

// registrar implements the kubelet's plugin registration.
type registrar struct {
	registration.UnimplementedRegistrationServer
	name, endpoint string
	refused        chan<- error
}

// GetInfo implements registration.RegistrationServer.
func (r registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: r.name, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"},
	}, nil
}

// NotifyRegistrationStatus implements registration.RegistrationServer.
func (r registrar) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if s.PluginRegistered {
		log.Printf("registered %s", r.name)
		return &registration.RegistrationStatusResponse{}, nil
	}
	select {
	case r.refused <- fmt.Errorf("the kubelet refused %s: %s", r.name, s.Error):
	default: // one refusal ends the process
	}
	return &registration.RegistrationStatusResponse{}, nil
}

// register offers the driver to the kubelet until ctx ends or the kubelet refuses it.
func register(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("csi-node-driver-registrar", flag.ExitOnError)
	address := flags.String("csi-address", "", "the driver's socket, as this process sees it")
	endpoint := flags.String("kubelet-registration-path", "", "the driver's socket, as the kubelet sees it")
	if err := flags.Parse(args); err != nil {
		return err
	}
	name, err := driverName(ctx, *address)
	if err != nil {
		return err
	}
	socket := filepath.Join(registrationDir, name+"-reg.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	refused := make(chan error, 1)
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, registrar{name: name, endpoint: *endpoint, refused: refused})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }() // ends with Stop
	defer server.Stop()
	select {
	case err := <-refused:
		return err
	case err := <-served:
		return err
	case <-ctx.Done():
		return nil
	}
}

// driverName asks the driver, and waits until it is there.
func driverName(ctx context.Context, address string) (string, error) {
	conn, err := dial(address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return "", err
	}
	return info.GetName(), nil
}
