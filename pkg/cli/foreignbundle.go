package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
)

func (a *app) bundleList() *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "list the bundles of foreign trust domains",
		Long:    "List prints the bundles of foreign trust domains that the server has, by name.",
		Example: "  hallmark bundle list\n  hallmark bundle list -o json",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.admin(cmd.Context(), *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		all, err := listBundles(cmd.Context(), c)
		if err != nil {
			return err
		}
		items := make([]*bundleItem, len(all))
		for i, b := range all {
			if items[i], _, err = bundleOf(b); err != nil {
				return err
			}
		}
		if len(items) == 0 && a.output == outputTable {
			a.remark("No bundles of foreign trust domains.")
			return nil
		}
		return a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"TRUST DOMAIN", "SEQUENCE", "X.509", "JWT"}}
			for _, b := range items {
				t.add(painted(a.style.bold, b.TrustDomain), text(fmt.Sprint(b.SequenceNumber)),
					text(fmt.Sprint(len(b.X509Authorities))), text(fmt.Sprint(len(b.JWTAuthorities))))
			}
			io.WriteString(w, t.String())
		})
	}
	return cmd
}

func (a *app) bundleSet() *cobra.Command {
	cmd := &cobra.Command{
		Use: "set DOMAIN FILE", Short: "store the bundle of a foreign trust domain",
		Long: "Set stores the bundle of a foreign trust domain, in place of the one that the server\n" +
			"has. The file (- is the standard input) holds X.509 authorities in PEM, or a SPIFFE\n" +
			"bundle document as \"hallmark bundle show -o spiffe\" prints it.",
		Example: "  hallmark bundle set other.org other.json\n  hallmark bundle show -o spiffe | hallmark bundle set example.org - --admin-socket /run/other.sock",
		Args:    arguments(2, 2, "a trust domain and a file"),
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		b, err := a.bundleFile(args[0], args[1])
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.bundles().BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		if err != nil {
			return rpcError("set the bundle of "+args[0], err)
		}
		if len(resp.Results) != 1 {
			return fmt.Errorf("set the bundle of %s: the server gave %d results for one bundle", args[0], len(resp.Results))
		}
		r := resp.Results[0]
		if r.GetStatus().GetCode() != int32(codes.OK) {
			return itemError("set the bundle of "+args[0], r.GetStatus().GetCode(), r.GetStatus().GetMessage())
		}
		item, _, err := bundleOf(r.Bundle)
		if err != nil {
			return err
		}
		return a.print(item, func(w io.Writer) { a.showBundle(w, item) })
	}
	return cmd
}

func (a *app) bundleDelete() *cobra.Command {
	mode := "restrict"
	modes := &choice{&mode, []string{"restrict", "delete", "dissociate"}}
	cmd := &cobra.Command{
		Use: "delete DOMAIN...", Short: "delete the bundles of foreign trust domains",
		Long: "Delete removes the bundles of foreign trust domains. The mode says what becomes of\n" +
			"entries that federate with them: restrict refuses while there are any, delete\n" +
			"deletes those too, dissociate takes the trust domain off them.",
		Example: "  hallmark bundle delete other.org\n  hallmark bundle delete other.org --mode dissociate",
		Args:    arguments(1, -1, "a trust domain"),
	}
	cmd.Flags().Var(modes, "mode", "`MODE`: restrict, delete or dissociate")
	_ = cmd.RegisterFlagCompletionFunc("mode", modes.complete) // fails only for a flag that does not exist
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.admin(cmd.Context(), *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		req := &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: args}
		switch mode {
		case "delete":
			req.Mode = bundlev1.BatchDeleteFederatedBundleRequest_DELETE
			if err := a.confirm(*yes, true, "This deletes the bundles and every entry that federates with them."); err != nil {
				return err
			}
		case "dissociate":
			req.Mode = bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		resp, err := c.bundles().BatchDeleteFederatedBundle(ctx, req)
		if err != nil {
			return rpcError("delete bundles", err)
		}
		var errs []error
		for _, r := range resp.Results {
			if r.GetStatus().GetCode() != int32(codes.OK) {
				errs = append(errs, itemError("delete the bundle of "+r.TrustDomain, r.GetStatus().GetCode(), r.GetStatus().GetMessage()))
				continue
			}
			fmt.Fprintf(a.out, "deleted %s\n", printable(r.TrustDomain))
		}
		return joined(errs)
	}
	return cmd
}
