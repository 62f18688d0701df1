package publish

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"time"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/server/cloudauth"
)

// AzureBlobConfig is a container of Azure Blob Storage. Credentials are found where
// Azure's tools find them: the environment, the workload identity of a pod, the
// machine's managed identity. They need the role Storage Blob Data Contributor on the
// container. Who may read the blobs is the container's access level's.
type AzureBlobConfig struct {
	// Account is the name of the storage account. It is required.
	Account string `yaml:"account" env:"expand"`
	// Container is its name; $web is that of a static website. It is required.
	Container string `yaml:"container" env:"expand"`
	// Prefix is the path in the container below which the documents are. Default: the
	// container itself.
	Prefix string `yaml:"prefix" env:"expand"`
	// Endpoint is the URL of the account outside of Azure's public cloud: HTTPS, or
	// HTTP on this machine. Default https://ACCOUNT.blob.core.windows.net.
	Endpoint string `yaml:"endpoint" env:"expand"`
}

const (
	azureScope   = "https://storage.azure.com/.default"
	azureVersion = "2023-11-03" // of the API
)

var (
	azureAccount   = regexp.MustCompile(`^[a-z0-9]{3,24}$`)
	azureContainer = regexp.MustCompile(`^(\$web|[a-z0-9](-?[a-z0-9]){2,62})$`)
)

func (c *AzureBlobConfig) check() error {
	switch {
	case !azureAccount.MatchString(c.Account):
		return fmt.Errorf("azure_blob.account is %.100q; write the name of a storage account, of small letters and digits", c.Account)
	case !azureContainer.MatchString(c.Container) || len(c.Container) > 63:
		return fmt.Errorf("azure_blob.container is %.100q; write the name of a container, or $web, in quotes", c.Container)
	}
	return checkRemote("azure_blob", c.Prefix, c.Endpoint)
}

func (c *AzureBlobConfig) store(string) store {
	a := &azureBlob{AzureBlobConfig: *c, api: cloud.API(), tokens: tokens{find: func() (cloudauth.Tokens, error) { return cloudauth.Azure(azureScope) }}}
	a.base = "https://" + c.Account + ".blob.core.windows.net"
	if c.Endpoint != "" {
		a.base, _ = cloud.CheckEndpoint(c.Endpoint)
	}
	a.base += "/" + c.Container
	if c.Prefix != "" {
		a.base += "/" + c.Prefix
	}
	return a
}

// azureBlob is a store in a container of Azure's.
type azureBlob struct {
	AzureBlobConfig
	base   string // URL of what names are below
	api    *cloud.Service
	tokens tokens
}

func (a *azureBlob) String() string { return a.base }

func (a *azureBlob) ask(ctx context.Context, method, name string, header map[string]string, body []byte) (*cloud.Answer, error) {
	bearer, err := a.tokens.bearer(ctx)
	if err != nil {
		return nil, err
	}
	header["Authorization"], header["x-ms-version"] = bearer, azureVersion
	header["x-ms-date"] = time.Now().UTC().Format(http.TimeFormat)
	answer, err := a.api.Do(ctx, cloud.Question{Method: method, URL: a.base + "/" + name, Header: header, Body: string(body), Most: maxAnswer})
	return answer, refused(err)
}

func (a *azureBlob) explain(err error) error {
	return remedy(err, "container "+a.Container+" of "+a.Account, "the role Storage Blob Data Contributor")
}

func (a *azureBlob) read(ctx context.Context, name string) (*object, error) {
	answer, err := a.ask(ctx, http.MethodGet, name, map[string]string{}, nil)
	var r *refusal
	switch {
	case errors.As(err, &r) && r.status == http.StatusNotFound && r.code == "BlobNotFound":
		return nil, nil
	case err != nil:
		return nil, a.explain(err)
	}
	return versioned(answer, "ETag")
}

func (a *azureBlob) write(ctx context.Context, name string, was, next *object) error {
	header := map[string]string{
		"x-ms-blob-type": "BlockBlob", "x-ms-blob-content-type": next.kind, "x-ms-blob-cache-control": next.cache,
		"Content-Type": next.kind,
	}
	if was == nil {
		header["If-None-Match"] = "*"
	} else {
		header["If-Match"] = was.version
	}
	_, err := a.ask(ctx, http.MethodPut, name, header, next.text)
	var r *refusal
	switch {
	case is(err, http.StatusPreconditionFailed):
		return errChanged
	case errors.As(err, &r) && r.status == http.StatusConflict && r.code == "BlobAlreadyExists":
		return errChanged
	}
	return a.explain(err)
}
