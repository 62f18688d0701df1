package cli

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/hallmark-id/hallmark/conf/schema"
	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

func (a *app) serverCommand() *cobra.Command {
	return noun("server", "run and look after a server",
		"A server rules a trust domain: it keeps the registry and signs identities.",
		"  hallmark server run -c /etc/hallmark/server.yaml\n  hallmark server health\n  hallmark server backup hallmark.backup",
		a.serverRun(), a.serverValidate(), a.schemaCommand("server", schema.Server), a.serverBackup(), a.serverRestore(), a.serverMigrate(), a.serverReencryptKeys(), a.serverHealth())
}

// configFlags are the file of a configuration and the flags that override it.
type configFlags struct {
	file, system string
	set          []string
	keys         []struct{ flag, path string }
}

func (f *configFlags) register(cmd *cobra.Command, program string) {
	f.system = "/etc/hallmark/" + program + ".yaml"
	cmd.Flags().StringVarP(&f.file, "config", "c", "", "configuration `FILE` (default "+f.system+" if it is there)")
	cmd.Flags().StringArrayVar(&f.set, "set", nil, "`KEY=VALUE` that overrides the file, like log.level=debug; repeat for several")
	fileFor(cmd, "config", "yaml", "yml")
}

// key gives a command a flag for a key of the configuration.
func (f *configFlags) key(cmd *cobra.Command, flag, path, usage string) {
	cmd.Flags().String(flag, "", usage)
	f.keys = append(f.keys, struct{ flag, path string }{flag, path})
}

// source reads the file and adds what the flags say.
func (f *configFlags) source(cmd *cobra.Command) (config.Source, error) {
	var src config.Source
	file := f.file
	if file == "" {
		if _, err := os.Stat(f.system); err == nil {
			file = f.system
		}
	}
	if file != "" {
		var err error
		if src, err = config.ReadFile(file); err != nil {
			return src, err
		}
	}
	for _, k := range f.keys {
		if flag := cmd.Flags().Lookup(k.flag); flag.Changed {
			src.Set = append(src.Set, config.Setting{Path: k.path, Value: flag.Value.String(), From: "--" + k.flag})
		}
	}
	for _, s := range f.set {
		path, value, ok := strings.Cut(s, "=")
		if !ok {
			return src, usageError(fmt.Errorf("--set %q has no value; write KEY=VALUE", s))
		}
		src.Set = append(src.Set, config.Setting{Path: path, Value: value, From: "--set " + path})
	}
	return src, nil
}

func (a *app) serverFlags(cmd *cobra.Command) *configFlags {
	f := &configFlags{}
	f.register(cmd, "server")
	f.key(cmd, "trust-domain", "trust_domain", "`name` of the trust domain, like example.org")
	f.key(cmd, "listen", "listen", "`HOST:PORT` to listen on for agents")
	f.key(cmd, "advertise", "advertise", "`HOST:PORT` that agents dial (default that of --listen)")
	f.key(cmd, "join", "store.etcd.embedded.join", "`STRING` from \"hallmark cluster invite\": join that cluster at the first start")
	f.key(cmd, "data-dir", "data_dir", "`DIR` of the store and the keys")
	f.key(cmd, "admin-socket", "admin_socket", "`PATH` of the socket for administration")
	f.key(cmd, "log-level", "log.level", "`level`: debug, info, warn or error")
	f.key(cmd, "log-format", "log.format", "`format`: text or json")
	return f
}

func (a *app) serverRun() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "run a server until it is told to stop",
		Long: "Run starts a server and logs to the standard error until it is interrupted. What\n" +
			"the flags say overrides the configuration file. SIGHUP has it read that again and\n" +
			"take over log.level and limits; other keys need a restart.",
		Example: "  hallmark server run -c /etc/hallmark/server.yaml\n  hallmark server run --trust-domain example.org --data-dir ./server --admin-socket ./server.sock",
		Args:    noArguments,
	}
	f := a.serverFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		src, err := f.source(cmd)
		if err != nil {
			return err
		}
		defer reloadOnHangup(&src)()
		return ended(cmd.Context(), a.programs.RunServer(cmd.Context(), src, func() {}))
	}
	return cmd
}

// reloadOnHangup has a program read its configuration again at SIGHUP. It
// returns what ends that.
func reloadOnHangup(src *config.Source) (stop func()) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	src.Reload = hangup
	return func() { signal.Stop(hangup) }
}

// ended is the outcome of a program that runs until it is told to stop: being
// told is no failure.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (a *app) serverValidate() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "validate",
		Short:   "check a server's configuration",
		Long:    "Validate says what is wrong with a server's configuration, and where. It starts nothing.",
		Example: "  hallmark server validate -c /etc/hallmark/server.yaml",
		Args:    noArguments,
	}
	f := a.serverFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		src, err := f.source(cmd)
		if err != nil {
			return err
		}
		return a.validateConfig(src, a.programs.CheckServer)
	}
	return cmd
}

func (a *app) validateConfig(src config.Source, check func(config.Source) error) error {
	if err := check(src); err != nil {
		return err
	}
	if src.Name == "" {
		src.Name = "the configuration"
	}
	fmt.Fprintf(a.out, "%s is valid\n", src.Name)
	return nil
}

func (a *app) serverBackup() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backup FILE|-",
		Short: "copy the registry of a running server",
		Long: "Backup writes a consistent copy of all that the server knows to a file, for this\n" +
			"user only, or to the standard output. It holds no private key: save the keys of the\n" +
			"authorities too, if they are to sign again after a restore.",
		Example: "  hallmark server backup /backup/hallmark-$(date +%F)\n  hallmark server backup - | gzip > hallmark.gz",
		Args:    arguments(1, 1, "a file, or - for the standard output"),
	}
	socket := socketFlag(cmd, serverSocket)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.admin(cmd.Context(), *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		if args[0] == "-" {
			_, _, err := backup(cmd.Context(), c, a.out)
			return err
		}
		path := args[0]
		f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
		if err != nil {
			return fmt.Errorf("write the backup: %w", err)
		}
		defer os.Remove(f.Name()) // fails once it was renamed
		size, revision, err := backup(cmd.Context(), c, f)
		if err != nil {
			f.Close()
			return err
		}
		if err = errors.Join(f.Sync(), f.Close()); err == nil {
			err = os.Rename(f.Name(), path)
		}
		if err != nil {
			return fmt.Errorf("write the backup: %w", err)
		}
		fmt.Fprintf(a.out, "%s: %s bytes, as of revision %d\n", path, thousands(int(size)), revision)
		return nil
	}
	return cmd
}

func backup(ctx context.Context, c *admin, w io.Writer) (size, revision int64, err error) {
	stream, err := c.server().Backup(ctx, &hallmarkv1.BackupRequest{})
	if err != nil {
		return 0, 0, rpcError("back up", err)
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, 0, errors.New("back up: the server ended the stream before the last part; the copy was discarded")
		}
		if err != nil {
			return 0, 0, rpcError("back up", err)
		}
		n, err := w.Write(resp.Data)
		size += int64(n)
		if err != nil {
			return 0, 0, fmt.Errorf("write the backup: %w", err)
		}
		if resp.Done {
			return size, resp.Revision, nil
		}
	}
}

func (a *app) serverRestore() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "restore FILE|-",
		Short: "fill the empty store of a stopped server from a backup",
		Long: "Restore reads a backup into the store that the configuration names. The server must\n" +
			"not run, and its store must be empty.",
		Example: "  hallmark server restore -c /etc/hallmark/server.yaml --yes /backup/hallmark-2026-11-23",
		Args:    arguments(1, 1, "a backup file, or - for the standard input"),
	}
	f := a.serverFlags(cmd)
	yes := yesFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		src, err := f.source(cmd)
		if err != nil {
			return err
		}
		if err := a.programs.CheckServer(src); err != nil {
			return err
		}
		name, r := "the standard input", a.in
		if args[0] != "-" {
			file, err := os.Open(args[0])
			if err != nil {
				return fmt.Errorf("read the backup: %w", err)
			}
			defer file.Close()
			name, r = args[0], file
		}
		what := fmt.Sprintf("This fills the server's store with what %s holds.", name)
		if err := a.confirm(*yes || args[0] == "-", true, what); err != nil {
			return err
		}
		records, err := a.programs.RestoreServer(cmd.Context(), src, r)
		if err != nil {
			return err
		}
		fmt.Fprintf(a.out, "restored %s from %s\n", count(records, "record", "records"), name)
		return nil
	}
	return cmd
}

// reencrypted is what `server reencrypt-keys` prints.
type reencrypted struct {
	Written int `json:"written"`
	Right   int `json:"right"` // already
}

func (a *app) serverReencryptKeys() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "reencrypt-keys",
		Short: "encrypt the key files of a stopped server, or decrypt them",
		Long: "Reencrypt-keys writes the files of the authorities' keys anew, as keys.disk.encryption in\n" +
			"the configuration now says: encrypted with its secret, or not encrypted if it is not set.\n" +
			"Files that are right stay as they are. It reads files that another secret encrypts with\n" +
			"that in --old-secret-file. Each file is replaced in one step: if this ends early, run it\n" +
			"again. The server must not run. Run this as the server's user.",
		Example: "  hallmark server reencrypt-keys -c /etc/hallmark/server.yaml\n  hallmark server reencrypt-keys -c /etc/hallmark/server.yaml --old-secret-file /root/old-secret",
		Args:    noArguments,
	}
	f := a.serverFlags(cmd)
	oldSecret := cmd.Flags().String("old-secret-file", "", "`FILE` with the secret that encrypted the keys until now")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		src, err := f.source(cmd)
		if err != nil {
			return err
		}
		written, right, err := a.programs.ReencryptKeys(src, *oldSecret)
		if err != nil {
			return err
		}
		return a.print(reencrypted{written, right}, func(w io.Writer) {
			fmt.Fprintf(w, "wrote %s anew; %d had the right form already\n", count(written, "key file", "key files"), right)
		})
	}
	return cmd
}

// migrated is what `server migrate` prints.
type migrated struct {
	Records int `json:"records"`
}

func (a *app) serverMigrate() *cobra.Command {
	var from, to string
	cmd := &cobra.Command{
		Use:   "migrate --from FILE --to FILE",
		Short: "move the store of a stopped server to another engine",
		Long: "Migrate copies the store that one configuration names into the empty one that another\n" +
			"names, and compares the two record by record. The server must not run. Its private\n" +
			"keys stay where they are: let both configurations name the same keys.",
		Example: "  hallmark server migrate --from badger.yaml --to etcd.yaml\n  hallmark server run -c etcd.yaml",
		Args:    noArguments,
	}
	cmd.Flags().StringVar(&from, "from", "", "configuration `FILE` that names the store as it is")
	cmd.Flags().StringVar(&to, "to", "", "configuration `FILE` that names the new store")
	a.outputFlag(cmd)
	for _, flag := range []string{"from", "to"} {
		fileFor(cmd, flag, "yaml", "yml")
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if from == "" || to == "" {
			return usageError(errors.New("--from and --to name the two configurations"))
		}
		var sources [2]config.Source
		for i, file := range []string{from, to} {
			var err error
			if sources[i], err = config.ReadFile(file); err != nil {
				return err
			}
		}
		records, err := a.programs.MigrateServer(cmd.Context(), sources[0], sources[1])
		if err != nil {
			return err
		}
		return a.print(migrated{records}, func(w io.Writer) {
			fmt.Fprintf(w, "copied and compared %s\n", count(records, "record", "records"))
		})
	}
	return cmd
}

// serverHealth is what `server health` prints.
type serverHealth struct {
	Status      string     `json:"status"` // serving or not_serving
	TrustDomain string     `json:"trust_domain"`
	Address     string     `json:"address"`
	Version     string     `json:"version"`
	Revision    int64      `json:"revision"`
	Digest      string     `json:"digest"` // of what it knows, hexadecimal
	StartedAt   *time.Time `json:"started_at"`
	KeysProblem string     `json:"keys_problem,omitempty"` // why nothing is signed now
}

func (a *app) serverHealth() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "health",
		Short:   "say whether the server is well",
		Long:    "Health asks a running server whether it serves, and fails if it does not.",
		Example: "  hallmark server health\n  hallmark server health -o json",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		health, err := grpc_health_v1.NewHealthClient(c).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		if err != nil {
			return rpcError("ask for the server's health", err)
		}
		info, err := c.server().GetServer(ctx, &hallmarkv1.GetServerRequest{})
		if err != nil {
			return rpcError("ask what the server is", err)
		}
		item := serverHealth{
			Status: strings.ToLower(health.Status.String()), TrustDomain: info.TrustDomain, Address: info.Address,
			Version: info.Version, Revision: info.Revision, Digest: hex.EncodeToString(info.Digest), StartedAt: timestamp(info.StartedAt),
			KeysProblem: info.KeysProblem,
		}
		serving := health.Status == grpc_health_v1.HealthCheckResponse_SERVING
		if err := a.print(item, func(w io.Writer) {
			d := details{style: a.style}
			if serving {
				d.addPainted("Status", a.style.green, "serving")
			} else {
				d.addPainted("Status", a.style.red, strings.ReplaceAll(item.Status, "_", " "))
			}
			if item.KeysProblem != "" {
				d.addPainted("Keys", a.style.red, item.KeysProblem)
			}
			d.add("Trust domain", item.TrustDomain)
			d.add("Address", item.Address)
			d.add("Version", item.Version)
			d.add("Revision", fmt.Sprint(item.Revision))
			d.add("Started", a.momentOf(item.StartedAt))
			io.WriteString(w, d.String())
		}); err != nil {
			return err
		}
		if !serving {
			return statusError(exitFailed)
		}
		return nil
	}
	return cmd
}
