package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxToken bounds a token read from the standard input, in bytes.
const maxToken = 64 << 10

func (a *app) validateCommand() *cobra.Command {
	return noun("validate", "verify what another process presents",
		"Validate checks an identity that another process presented, with the bundles that\n"+
			"the Workload API gives this process.",
		"  hallmark validate jwt --audience api.internal TOKEN",
		a.validateJWT())
}

func (a *app) validateJWT() *cobra.Command {
	var audience string
	cmd := &cobra.Command{
		Use:   "jwt --audience AUDIENCE TOKEN|-",
		Short: "verify a JWT-SVID",
		Long: "Validate asks the Workload API whether a JWT-SVID is genuine, current and meant for\n" +
			"the audience, and prints what it says. It fails if the token is not valid. With - the\n" +
			"token is read from the standard input.",
		Example: "  hallmark validate jwt --audience api.internal eyJhbGciOi…\n  hallmark fetch jwt --audience a | hallmark validate jwt --audience a -",
		Args:    arguments(1, 1, "a token, or - to read it from the standard input"),
	}
	cmd.Flags().StringVar(&audience, "audience", "", "`name` of whom the token must be for")
	socket := socketFlag(cmd, workloadSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := required(cmd, "audience"); err != nil {
			return err
		}
		token := args[0]
		if token == "-" {
			text, err := io.ReadAll(io.LimitReader(a.in, maxToken+1))
			if err != nil {
				return fmt.Errorf("read the token: %w", err)
			}
			token = strings.TrimSpace(string(text))
			if len(text) > maxToken {
				return usageError(fmt.Errorf("the standard input holds more than the %d bytes of a token", maxToken))
			}
		}
		if token == "" {
			return usageError(errors.New("the token is empty"))
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		client, err := workload(ctx, *socket)
		if err != nil {
			return err
		}
		defer client.Close()
		svid, err := client.ValidateJWTSVID(ctx, token, audience)
		if err != nil {
			if s, ok := status.FromError(err); ok && s.Code() == codes.InvalidArgument {
				return fmt.Errorf("the token is not valid: %s", s.Message())
			}
			return workloadError("validate the token", err)
		}
		item := jwtOf(svid)
		item.Token = "" // the caller has it
		return a.print(item, func(w io.Writer) {
			fmt.Fprintf(w, "%s\n", a.style.bold(item.SPIFFEID))
			d := details{style: a.style}
			d.addPainted("Valid", a.style.green, "yes, for "+printable(audience))
			d.add("Expires", a.moment(*item.ExpiresAt))
			d.add("Audience", item.Audience...)
			var names []string
			for name := range item.Claims {
				if !slices.Contains([]string{"sub", "aud", "exp", "iat", "nbf"}, name) {
					names = append(names, name)
				}
			}
			slices.Sort(names)
			for _, name := range names {
				d.add(name, fmt.Sprint(item.Claims[name]))
			}
			io.WriteString(w, d.String())
		})
	}
	return cmd
}
