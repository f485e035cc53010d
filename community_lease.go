package openaisecrets

// This file owns the leases of the community plugin as this engine revokes them;
// community.go has its config and roles.

import (
	"context"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// isCommunityLease reports whether a lease was issued by the community plugin. Its
// data are the three IDs that its own revoke asks for.
func isCommunityLease(secret *logical.Secret) bool {
	if _, ours := secret.InternalData["version"]; ours {
		return false
	}
	for _, field := range []string{"project_id", "service_account_id", "api_key_id"} {
		if id, _ := secret.InternalData[field].(string); id == "" {
			return false
		}
	}
	return true
}

// communityLease is a lease of the community plugin as this engine revokes it.
// Its role is in the path at which it was issued.
func communityLease(req *logical.Request) leaseData {
	id := func(field string) string { return req.Secret.InternalData[field].(string) }
	return leaseData{
		credential: credential{
			Version: credentialVersion, Type: typeAccount,
			ProjectID: id("project_id"), ID: id("service_account_id"), KeyID: id("api_key_id"),
			CreatedAt: req.Secret.IssueTime,
		},
		Role: strings.TrimPrefix(req.Path, "creds/"), KeyExpiry: expiryNone,
	}
}

// unlessCommunity refuses to renew a lease of the community plugin. Vault asks for
// none of them, since that plugin issues them as not renewable.
func unlessCommunity(renew framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		if req.Secret != nil && isCommunityLease(req.Secret) {
			return logical.ErrorResponse("the lease was issued by the community plugin, whose leases cannot be renewed; read %s%s for a new one", req.MountPoint, req.Path), nil
		}
		return renew(ctx, req, d)
	}
}
